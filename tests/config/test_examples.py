# SPDX-License-Identifier: Apache-2.0
"""The example of a vendor's profile, brought by a package as it stands."""

from pathlib import Path

from installed_packages import Packages

from sglang_fl.config import load_settings
from sglang_fl.device import Device
from sglang_fl.device.declaration import ENTRY_POINT_GROUP
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.startup.words import settings_words

PROFILE = Path(__file__).parents[2] / "examples" / "vendor_profile.yaml"
PACKAGE = f"""
from sglang_fl.vendor_platform import VendorPlatform

PLATFORM = VendorPlatform(name="mychip", device_type="cpu", is_present=lambda: True, flaggems=True, profile={str(PROFILE)!r})
"""


def test_a_vendors_profile(packages: Packages) -> None:
    packages.install(PACKAGE, {ENTRY_POINT_GROUP: "{module}:PLATFORM"})
    settings = load_settings({}, device=Device("mychip", "cpu", None, "a test"), words=settings_words(OpManager()))
    assert settings.profile_file == str(PROFILE) and settings.prefer == "vendor"
    assert dict(settings.op_backends)["rms_norm"] == ("vendor:mychip", "flagos", "reference")
    assert settings.flagos_functions == ("mul", "silu") and settings.flagos_scope == "graphs"
    preferred = load_settings({"SGLANG_FL_PREFER": "flagos"}, device=Device("mychip", "cpu", None, "a test"))
    assert preferred.flagos_functions is None and "flagos_broken" in str(preferred.flagos_exclusion_reason("cumsum"))
