# SPDX-License-Identifier: Apache-2.0
"""``sgl_kernel`` on a chip that imitates CUDA and has no build of it.

SGLang imports functions of ``sgl_kernel`` wherever PyTorch is built for CUDA or ROCm, also for models and modes that never call
them. Without that package SGLang cannot be imported there. A module of that name, in its place, lets it: its functions say at
a call that they are not there. Nothing is replaced where the package is installed.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

PACKAGE = "sgl_kernel"


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """SGLang's graphs keep outputs with it without owning their memory. A tensor that does own it costs memory and changes nothing else."""
    return tensor


#: What SGLang calls on its way to a server, and what it is here.
_PRESENT: dict[str, Callable[..., Any]] = {
    f"{PACKAGE}.weak_ref_tensor": weak_ref_tensor,
    f"{PACKAGE}.utils.is_arch_support_pdl": lambda: False,
}


#: The modules that SGLang imports without asking whether they are there. Of others it can do without.
_MODULES = frozenset({PACKAGE, *(f"{PACKAGE}.{name}" for name in ("elementwise", "flash_attn", "kvcacheio", "quantization", "utils"))})


class _AbsentKernels(ModuleType):
    """A module whose functions raise at a call."""

    def __getattr__(self, name: str) -> Any:
        path = f"{self.__name__}.{name}"
        if name.startswith("__"):
            raise AttributeError(path)
        if path in _PRESENT:
            return _PRESENT[path]

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"SGLang called {path}, and sglang-kernel is not installed: install the chip vendor's build of it, or serve without what "
                "needs it (sglang-fl ops lists what FlagOS and the vendor's package have for an operator)"
            )

        absent.__name__ = name
        return absent


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AbsentKernels(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for_absent_kernels() -> None:
    """Before SGLang's layers are imported, in each process."""
    if importlib.util.find_spec(PACKAGE) is None:
        sys.meta_path.append(_Finder())
        # SGLang compares the version of what is installed, of which there is none.
        os.environ["SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK"] = "1"
