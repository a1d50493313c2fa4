# SPDX-License-Identifier: Apache-2.0
from sglang_fl.dispatch.backends import KernelBackend


class MyChipBackend(KernelBackend):
    """MyChip's kernels: the functions of ``impl``, which is imported at the first call."""

    name = "mychip"
    vendor = "mychip"

    # Without this the backend can run everywhere, as plain PyTorch does. Say when your kernels can. Import nothing heavy:
    # the command line asks too.
    #
    # def why_unavailable(self) -> str | None:
    #     """None if the backend can run on this machine, else the reason in words."""
    #     import importlib.util
    #     from sglang_fl.device import probe
    #
    #     device = probe()
    #     if device.vendor != "mychip":
    #         return f"its kernels are for mychip, and this device is {device.vendor}"
    #     if importlib.util.find_spec("torch_mychip") is None:
    #         return "torch_mychip is not installed"
    #     return None
