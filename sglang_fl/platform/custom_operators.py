# SPDX-License-Identifier: Apache-2.0
"""SGLang's custom operators for PyTorch's dispatcher, on a chip that imitates CUDA.

On an out-of-tree platform SGLang registers them for PyTorch's ``PrivateUse1``, the device of an extension. A chip that imitates CUDA
has CUDA tensors, for which the dispatcher then finds nothing. SGLang calls the function itself where it can; with a profiler on, or
under a dispatch mode, it goes through the dispatcher, and the server would end.
"""

import torch

from ..utils.dispatcher import kernel_of

_PRIVATE = "PrivateUse1"
_libraries: list[torch.library.Library] = []


def register_for(device_type: str) -> list[str]:
    """Register for a device what SGLang has registered for ``PrivateUse1`` so far. Nothing where that is the device's own key.

    Returns:
        The operators, as ``sglang::fused_inplace_qknorm``.
    """
    key = torch._C._dispatch_key_for_device(device_type)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sglang::") and not has(name, key)]
    kernels = {name: kernel for name in names if has(name, _PRIVATE) and (kernel := kernel_of(name, _PRIVATE)) is not None}
    if kernels:
        library = torch.library.Library("sglang", "IMPL")
        _libraries.append(library)
        for name, kernel in kernels.items():
            library.impl(name.partition("::")[2], kernel, key)
    return list(kernels)
