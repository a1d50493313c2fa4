# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

from sglang_fl.config import load_settings
from sglang_fl.vendor_platform import declared

from sglang_fl_mychip.platform import PLATFORM


def test_sglang_fl_finds_the_platform() -> None:
    assert declared().platforms["mychip"] is PLATFORM
    assert declared().problems == ()


def test_the_profile_can_be_read() -> None:
    settings = load_settings({"SGLANG_FL_PLATFORM": "mychip"})
    assert settings.profile_file == str(PLATFORM.profile)


def test_the_platform_is_light() -> None:
    """It is part of ``import sglang`` and of every command line."""
    code = "import sys, sglang_fl_mychip.platform; print(sorted({'torch', 'sglang', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
