# SPDX-License-Identifier: Apache-2.0
"""An archive with the inputs of a case, and a script that repeats it with PyTorch and the kernel's package."""

import functools
import inspect
import io
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..dispatch.kernel_implementations import KernelFunction
from ..dispatch.signature import fitted
from ..dispatch.types import LazyFunction, OpImpl
from . import compare
from .cases import OPERATORS_CHECKED, Call, Case

#: Larger inputs are not written. In bytes.
_LARGEST = 256 << 20

_SCRIPT = '''"""{title}

Unpack the archive, and run ``python repeat.py`` where PyTorch and {needs} are installed.
It exits with 1 if a result, its dtype or its shape is wrong, or if a read-only input was written.
"""

import types
import torch
from compare import compare
{function}
torch.serialization.add_safe_globals([types.SimpleNamespace])
arguments, named = torch.load(__file__.replace("repeat.py", "inputs.pt"), map_location="{device}")
returned = function(*arguments, **named)
results = {results}
raise SystemExit(compare(results, arguments, named))
'''
_BY_NAME = "from {module} import {name} as function"
_REGISTERED = """from sglang_fl.dispatch.manager import get_default_manager
get_default_manager().ensure_initialized()
function = get_default_manager().registry.get_implementation({op!r}, {impl!r}).function"""

Function = Callable[..., Any]


@dataclass(frozen=True)
class Recorded:
    """A call to repeat.

    Attributes:
        arguments, named: as the function gets them.
        exact: for each result its name, the exact numbers, the bound of each, and the dtype.
        updated: the arguments that are also results.
        may_write: the other arguments that may be written.
        returns: False if what it returns does not count.
    """

    arguments: Sequence[Any]
    named: Mapping[str, Any]
    exact: Sequence[tuple[str, torch.Tensor, torch.Tensor, torch.dtype]]
    updated: Sequence[Any] = ()
    may_write: Sequence[Any] = ()
    returns: bool = True

    def places(self, of: Sequence[Any]) -> list[int]:
        """The indices of arguments, positional ones first."""
        arguments = [*self.arguments, *self.named.values()]
        return [place for one in of for place, x in enumerate(arguments) if x is one and x is not None]

    def described(self) -> str:
        """The dtypes and shapes of its tensors."""
        given = [*map(str, range(len(self.arguments))), *self.named]
        tensors = zip(given, [*self.arguments, *self.named.values()], strict=True)
        told = [f"{name}: {_words(x)}" for name, x in tensors if isinstance(x, (torch.Tensor, list, tuple))]
        return "; ".join(told)


def write_archive(directory: Path, impl: OpImpl, case: Case, seed: int, device: torch.device) -> str:
    """Write a case's inputs, the exact results and the script. Returns the file's name, or why there is none."""
    call = case.draw(seed, device)
    size = sum(x.untyped_storage().nbytes() for x in call.tensors().values())
    if size > _LARGEST:
        return f"not written: its inputs are {size >> 20} MiB"
    title = f"{impl.impl_id}: {case.op} {case.check} {case.name} {case.dtype}"
    return write_files(directory, title, impl, device, recorded(call, OPERATORS_CHECKED[case.op].exact(call), getattr(torch, case.dtype)))


def recorded(call: Call, exact: Sequence[Any], dtype: torch.dtype) -> Recorded:
    """A call of an operator, whose activations have a dtype, and its exact results."""
    arguments, named = call.arguments()
    may_write = [call.inputs[name] for name in call.may_write if name in call.inputs]
    # What is judged as a whole has no bound for each number.
    bounded = [(one.name, one.value, one.bound(dtype), _dtype_of(one, dtype)) for one in exact if hasattr(one, "bound")]
    return Recorded(arguments, named, bounded, [call.inputs[name] for name in call.updated], may_write, call.returns)


def _dtype_of(exact: Any, dtype: torch.dtype) -> torch.dtype:
    own: torch.dtype | None = exact.dtype if hasattr(exact, "dtype") else exact.value.dtype
    return own or dtype


def write_files(directory: Path, title: str, function: OpImpl | Function, device: torch.device, call: Recorded) -> str:
    """Write an archive whose ``repeat.py`` calls a function and compares its results with the exact ones. Returns the file's name.

    Raises:
        LookupError: there is no way to get to the function from another process.
    """
    if isinstance(function, OpImpl):
        (lines, needs), call = _of_implementation(function, call)
    else:
        by_name = _by_name(function)
        if by_name is None:
            raise LookupError(f"{function} cannot be imported by a name")
        lines, needs = by_name
    file = directory / (re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-") + ".zip")
    updated = call.places(call.updated)
    # What must be nan or infinite is not counted.
    exact = [(name, value, bound.where(value.isfinite(), torch.inf).flatten(), dtype) for name, value, bound, dtype in call.exact]
    script = _SCRIPT.format(title=title, needs=needs, function=lines, device=device.type, results=_results(call, updated))
    arguments = kept(call.arguments), {name: kept(x) for name, x in call.named.items()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.pt", _saved(arguments))
        archive.writestr("exact.pt", _saved((exact, [*updated, *call.places(call.may_write)])))
        archive.writestr("repeat.py", script)
        archive.writestr("compare.py", inspect.getsource(compare))
    return str(file)


def _of_implementation(impl: OpImpl, call: Recorded) -> tuple[tuple[str, str], Recorded]:
    """How to get to an implementation's function, and the call with the arguments in that function's order."""
    lazy = impl.fn if isinstance(impl.fn, LazyFunction) else None
    by_name = _named(lazy.module, lazy.name) if lazy else _by_name(impl.fn)
    if by_name is None:
        needs = "sglang-fl with the package of this function (SGLANG_FL_PLUGIN_MODULES as for the server)"
        return (_REGISTERED.format(op=impl.op_name, impl=impl.impl_id), needs), call
    if isinstance(lazy, KernelFunction):
        return by_name, call if lazy.takes_grid else replace(call, arguments=call.arguments[1:])

    def record(*arguments: Any, **named: Any) -> Any:
        return arguments, named

    functools.update_wrapper(record, lazy.load() if lazy else impl.fn, assigned=(), updated=())  # its parameters
    arguments, named = fitted(impl.op_name, record)(*call.arguments, **call.named)
    return by_name, replace(call, arguments=arguments, named=named)


def _named(module: str, name: str) -> tuple[str, str]:
    return _BY_NAME.format(module=module, name=name), f"the package of {module}"


def _by_name(function: Function) -> tuple[str, str] | None:
    """The line that imports a function by a name of its module, and what it needs. None: a closure, a method of an object."""
    inner = function.func if isinstance(function, functools.partial) else function
    module = str(getattr(inner, "__module__", None))
    held = vars(sys.modules[module]) if module in sys.modules else {}
    names = [name for name, value in held.items() if value is function]
    own = getattr(function, "__qualname__", "")
    if inspect.isfunction(function) and callable(held.get(own)):  # one of the two may be wrapped
        names.append(own)
    return _named(module, names[0]) if names else None


def _words(x: Any) -> str:
    return (
        f"{x.dtype} {tuple(x.shape)}"
        if isinstance(x, torch.Tensor)
        else ", ".join(map(_words, x))
        if isinstance(x, (list, tuple))
        else str(x)
    )


def _results(call: Recorded, updated: Sequence[int]) -> str:
    """An expression for the results: what the function returned, and the arguments that it wrote."""
    places = [f"arguments[{place}]" for place in range(len(call.arguments))] + [f"named[{name!r}]" for name in call.named]
    written = f"[{', '.join(places[place] for place in updated)}]"
    if not call.returns:
        return written
    returned = "[x for x in (returned if isinstance(returned, (tuple, list)) else [returned]) if x is not None]"
    return f"{returned} + {written}" if updated else returned


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def kept(value: Any) -> Any:
    """Convert an argument for an archive: a tensor keeps its strides, an object its attributes."""
    if isinstance(value, (list, tuple)):
        return [kept(one) for one in value]
    if isinstance(value, (SimpleNamespace, nn.Module)):
        held = {**vars(value), **(value._parameters if isinstance(value, nn.Module) else {})}
        return SimpleNamespace(**{name: kept(one) for name, one in held.items() if not name.startswith("_")})
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    storage = value.detach().as_strided((size,), (1,), 0).cpu()
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())
