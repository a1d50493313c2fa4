# SPDX-License-Identifier: Apache-2.0
"""MyChip's kernels, by operator. A function is imported at its first call."""

from sglang_fl.dispatch import BackendImplKind
from sglang_fl.dispatch.backends import Kernel, KernelTable

# Without this the backend runs everywhere, as plain PyTorch does. Say when your kernels can run, and name it below. Import
# nothing heavy: the command line asks too.
#
# def why_unavailable(settings, device):
#     """None if the backend can run on this device, else the reason in words."""
#     import importlib.util
#
#     if device.vendor != "mychip":
#         return f"its kernels are for mychip, and this device is {device.vendor}"
#     if importlib.util.find_spec("torch_mychip") is None:
#         return "torch_mychip is not installed"
#     return None

BACKEND = KernelTable(
    package=__package__,
    impl_id="vendor.mychip",
    kind=BackendImplKind.VENDOR,
    vendor="mychip",
    # why_unavailable=why_unavailable,
    kernels={
        "rms_norm": Kernel(
            "impl.normalization:rms_norm",
            # The activation dtypes that it takes; None: fp32, bf16 and fp16. A layer of another dtype goes to the next in order.
            # dtypes=("bfloat16", "float16"),
            #
            # False only if a call that raises has never written its inputs: then another implementation may take the call over.
            writes_inputs=False,
            #
            # The least device capability that it needs.
            # min_arch="9.0",
            #
            # True if a row's result is the same, bit for bit, whatever else is in the batch: it then serves under
            # --enable-deterministic-inference, too.
            # batch_invariant=True,
        ),
    },
)
