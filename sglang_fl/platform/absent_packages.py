# SPDX-License-Identifier: Apache-2.0
"""Packages that SGLang imports and that cannot be used: a module in the place of each.

SGLang imports names of ``sgl_kernel``, ``triton`` and others also for models and modes that never call them. A module in a
package's place lets it: what the chip's package does not provide there says at a call that it is missing. A package that can be
imported is left alone, unless it is declared otherwise (``VendorPlatform.hide_installed``). On a chip that imitates CUDA this is so
for ``sgl_kernel``, which SGLang imports wherever PyTorch is built for CUDA or ROCm; of every other chip its package says what it
stands in for (``VendorPlatform.stand_ins``).
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..device import Device, declared
from ..utils.packages import last_line
from .absent_triton import PRESENT as TRITON
from .absent_triton import NoTriton

if TYPE_CHECKING:
    import torch


def weak_ref_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """SGLang's graphs keep outputs with it without owning their memory. A tensor that does own it costs memory and changes nothing else."""
    return tensor


#: What SGLang needs on its way to a server, and what it is where the chip's package does not provide it.
_PRESENT: Mapping[str, Any] = {
    "sgl_kernel.weak_ref_tensor": weak_ref_tensor,
    "sgl_kernel.utils.is_arch_support_pdl": lambda: False,
    **TRITON,
}
#: The module that puts all of this in place before SGLang is imported.
SERVE = "sglang_fl.platform.serve"
#: What SGLang imports where it is there, calls at once, and does without where it is not.
_LEFT_OUT = frozenset({"triton.knobs"})
#: The modules of ``sgl_kernel`` that SGLang imports without asking whether they are there. Of others it can do without.
_SGL_KERNEL = frozenset(f"sgl_kernel{part}" for part in ("", ".elementwise", ".flash_attn", ".kvcacheio", ".quantization", ".utils"))


#: What a provider has under a name that it does not have.
_NOTHING = object()


class Absent:
    """A name of a package that cannot be used. It can be imported, annotated with and derived from."""

    def __init__(self, path: str):
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package = self._path.partition(".")[0]
        if package == "triton":
            raise NoTriton(f"SGLang called {self._path}, and there is no Triton for this chip")
        raise NotImplementedError(
            f"SGLang called {self._path}, and {package} {_finder.reasons[package]}: install the chip vendor's build of it, have the "
            "vendor's package provide the function (VendorPlatform.stand_ins), or serve without what needs it (sglang-fl ops lists what "
            "there is for an operator)"
        )

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._path}.{name}")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return ()

    def __instancecheck__(self, instance: Any) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __repr__(self) -> str:
        package = self._path.partition(".")[0]
        return f"<{self._path}; {package} {_finder.reasons[package]}>"


class _AbsentModule(ModuleType):
    """A module of a package that cannot be used, with what is provided for it."""

    #: The module that has what the chip's package provides, or None.
    _provider: ModuleType | None = None
    #: Whether that module is being imported.
    _importing = False

    def __getattr__(self, name: str) -> Any:
        path = f"{self.__name__}.{name}"
        provided = getattr(self._provider, name, _NOTHING)
        if self._is_part(name, provided):
            return importlib.import_module(path)
        if provided is not _NOTHING:
            return provided
        if path in _PRESENT:
            return _PRESENT[path]
        if name.startswith("__"):
            raise AttributeError(path)
        if self._importing:
            raise ImportError(f"it imports {path}, for which it stands in itself")
        return Absent(path)

    def _is_part(self, name: str, provided: Any) -> bool:
        """Whether a name is that of a module of the provider's: ``from sgl_kernel import part`` asks for it as for a function."""
        if self._provider is None or name.startswith("__"):
            return False
        part = f"{self._provider.__name__}.{name}"
        return _is_there(part) if provided is _NOTHING else isinstance(provided, ModuleType) and provided.__name__ == part


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of packages that cannot be used.

    Attributes:
        providers: package -> the module that has what is provided for it, or None.
        reasons: package -> why it is stood in for, as in "is not installed".
        only: package -> the modules of it that are found; all of those that it does not name.
    """

    def __init__(self) -> None:
        self.providers: dict[str, str | None] = {}
        self.reasons: dict[str, str] = {}
        self.only: dict[str, frozenset[str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in self.providers or fullname in _LEFT_OUT or fullname not in self.only.get(package, (fullname,)):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        package, _, rest = module.__name__.partition(".")
        provider = self.providers[package]
        if provider is not None:
            # The part of the provider that stands for this module; without one, nothing is provided here.
            name = f"{provider}.{rest}" if rest else provider
            if not rest or _is_there(name):
                module._importing = True  # type: ignore[attr-defined]
                try:
                    module._provider = importlib.import_module(name)  # type: ignore[attr-defined]
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a SystemExit would end the server without a word
                    raise ImportError(f"{name}, which stands in for {module.__name__}, cannot be imported: {last_line(error)}") from error
                finally:
                    module._importing = False  # type: ignore[attr-defined]


_finder = _Finder()


def stand_in_for_absent_packages(device: Device) -> Mapping[str, str]:
    """Before SGLang's layers are imported, and for Triton before SGLang itself is; in each process.

    Returns:
        Each package that modules stand in for now, and why, as in "is not installed".
    """
    declaration = declared().platforms.get(device.vendor)
    wanted = dict(declaration.stand_ins) if declaration is not None else {}
    if device.device_type == "cuda" and device.in_tree is None and "sgl_kernel" not in wanted:
        wanted["sgl_kernel"] = None
        _finder.only["sgl_kernel"] = _SGL_KERNEL
    if wanted and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for package in sorted(wanted, key=lambda package: package != "triton"):  # which others import
        if package in _finder.providers or (package == "triton" and package in sys.modules and "sglang.srt.utils" in sys.modules):
            continue
        reason = _why_not_used(package, device)
        if reason is not None:
            _forget(package)
            if package == "triton":
                _settle_pytorch()
            _finder.providers[package], _finder.reasons[package] = wanted[package], reason
    if "sgl_kernel" in _finder.providers:
        # SGLang compares the version of what is installed with the one that it needs.
        os.environ["SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK"] = "1"
    return dict(_finder.reasons)


def server_module(device: Device) -> str:
    """The module that starts a server here: SGLang's own, or ours where there is no Triton, which SGLang imports before it asks us."""
    declaration = declared().platforms.get(device.vendor)
    needs_ours = (
        declaration is not None
        and "triton" in declaration.stand_ins
        and (stands_in_for("triton") or _why_not_used("triton", device) is not None)
    )
    return SERVE if needs_ours else "sglang.launch_server"


def stands_in_for(package: str) -> bool:
    """Whether a module stands in for a package in this process."""
    return package in _finder.providers


def _why_not_used(package: str, device: Device) -> str | None:
    """Why SGLang is not to use a package: it is missing or broken, or the chip's package hides it. Or None."""
    if not _is_there(package):
        return "is not installed"
    declaration = declared().platforms.get(device.vendor)
    if declaration is not None and package in declaration.hide_installed:
        return "is hidden by the chip's package"
    try:
        module = importlib.import_module(package)
        if package == "triton" and not _has_driver(module):
            return "is installed and finds no driver for this chip"
    except Exception as error:  # whatever a library of it raises
        _forget(package)
        return f"is installed and cannot be imported ({last_line(error)})"
    return None


def _has_driver(triton: ModuleType) -> bool:
    backends = getattr(getattr(triton, "backends", None), "backends", None)
    return backends is None or any(backend.driver.is_active() for backend in backends.values())


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a part of the name is no package
        return False


def _settle_pytorch() -> None:
    """Have PyTorch find out that there is no Triton, before there is a module of that name: it asks once."""
    from torch.utils._triton import has_triton_package

    sys.modules["triton"] = None  # type: ignore[assignment]  # Python's way to let an import fail
    has_triton_package()
    importlib.import_module("torch._inductor.runtime.triton_compat")
    del sys.modules["triton"]
