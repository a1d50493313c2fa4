# SPDX-License-Identifier: Apache-2.0
"""SGLang's custom operators for PyTorch's dispatcher, on a chip that imitates CUDA.

On an out-of-tree platform SGLang registers them for PyTorch's ``PrivateUse1``, the device of an extension. A chip that imitates CUDA
has CUDA tensors, for which the dispatcher then finds nothing. SGLang calls the function itself where it can; with a profiler on, or
under a dispatch mode, it goes through the dispatcher, and the server would end.
"""

import functools
from typing import Any

import torch

_PRIVATE = "PrivateUse1"
_libraries: list[torch.library.Library] = []


def register_for(device_type: str) -> list[str]:
    """Register for a device what SGLang has registered for ``PrivateUse1`` so far. Nothing where that is the device's own key.

    Returns:
        The operators, as ``sglang::fused_inplace_qknorm``.
    """
    key = torch._C._dispatch_key_for_device(device_type)
    get_kernel = getattr(torch.library, "get_kernel", None)
    if key == _PRIVATE or get_kernel is None:
        return []
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sglang::")]
    names = [name for name in names if has(name, _PRIVATE) and not has(name, key)]
    if names:
        library = torch.library.Library("sglang", "IMPL")
        _libraries.append(library)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _PRIVATE))
        for name in names:
            call: Any = functools.partial(get_kernel(name, _PRIVATE).call_boxed, keys)
            library.impl(name.partition("::")[2], call, key)
    return names
