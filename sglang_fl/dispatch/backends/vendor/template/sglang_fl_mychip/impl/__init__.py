# SPDX-License-Identifier: Apache-2.0
"""The operators' functions, a file a family. Importing this imports PyTorch, and may import your kernels.

``sglang_fl.dispatch.backends.KernelBackend`` has the functions' signatures; a function that is added here is named in
``register_ops.OPERATORS``, too.
"""

from .normalization import rms_norm

__all__ = ["rms_norm"]
