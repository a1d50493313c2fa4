# SPDX-License-Identifier: Apache-2.0
"""Where the references of SGLang's kernels run: on devices without Triton, and where the order of a kernel names them."""

import pytest
from installed_packages import Packages

from sglang_fl.config import Settings
from sglang_fl.device import ENTRY_POINT_GROUP, Device
from sglang_fl.dispatch import OpRegistry, kernel_implementations
from sglang_fl.dispatch.kernel_implementations import may_be_replaced, register_builtins
from sglang_fl.kernels import KernelReplacement

KERNEL = "sglang.module:kernel"
NVIDIA, CPU = Device("nvidia", "cuda", "cuda", "a test"), Device("cpu", "cpu", None, "a test")
METAX, FASTCHIP = Device("metax", "cuda", None, "a test"), Device("fastchip", "cpu", None, "a test")
NAMED = Settings(op_backends=((KERNEL, ("reference",)),))


@pytest.mark.parametrize(
    ("device", "settings", "runs"),
    [
        (NVIDIA, Settings(), False),
        (METAX, Settings(), False),
        (CPU, Settings(), True),
        (FASTCHIP, Settings(), True),  # it has the capability, by kernels of its own, and stands in for Triton
        (NVIDIA, Settings(prefer="reference"), False),
        (NVIDIA, NAMED, True),
    ],
)
def test_where(packages: Packages, monkeypatch: pytest.MonkeyPatch, device: Device, settings: Settings, runs: bool) -> None:
    fields = "name='fastchip', device_type='cpu', is_present=lambda: True, capabilities=('supports_triton',), stand_ins={'triton': None}"
    code = f"from sglang_fl.vendor_platform import VendorPlatform\nPLATFORM = VendorPlatform({fields})"
    packages.install(code, {ENTRY_POINT_GROUP: "{module}:PLATFORM"})
    monkeypatch.setattr(kernel_implementations, "REFERENCES", {KERNEL: KernelReplacement("a_package.module:function")})
    registry = OpRegistry()
    register_builtins(registry)
    (impl,) = registry.get_implementations(KERNEL)
    assert impl.is_available(settings, device) is runs is may_be_replaced(settings, device)
