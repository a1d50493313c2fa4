# SPDX-License-Identifier: Apache-2.0
"""MyChip's kernels, by operator. A function is imported at its first call."""

from sglang_fl.dispatch import BackendImplKind
from sglang_fl.dispatch.backends import Kernel, KernelTable

# Without this function the backend is available on every device, as plain PyTorch is. Say when your kernels can run, and name
# the function below. Import nothing heavy: the command line calls it too.
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
            # The supported activation dtypes. None: fp32, bf16 and fp16. Layers of other dtypes use the next one in the order.
            # dtypes=("bfloat16", "float16"),
            #
            # False only if a call that raises has never written its inputs. Then another implementation may repeat the call.
            writes_inputs=False,
            #
            # The lowest device capability that it supports.
            # min_arch="9.0",
            #
            # True if a row's result is the same, bit for bit, for any other rows in the batch. Then it is also used with
            # --enable-deterministic-inference.
            # batch_invariant=True,
        ),
    },
)
