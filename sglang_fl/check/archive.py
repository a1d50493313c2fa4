# SPDX-License-Identifier: Apache-2.0
"""An archive with the inputs of a case, and a script that repeats it with PyTorch and the kernel's package."""

import io
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..dispatch.kernel_implementations import KernelFunction
from ..dispatch.types import LazyFunction, OpImpl
from .cases import OPERATORS_CHECKED, Call, Case

#: Larger inputs are not written. In bytes.
_LARGEST = 256 << 20

_SCRIPT = '''"""{title}

Unpack the archive, and run ``python repeat.py`` where PyTorch and the package of {module} are installed.
"""

import pathlib
import types

import torch
from {module} import {function} as function

torch.serialization.add_safe_globals([types.SimpleNamespace])
here = pathlib.Path(__file__).parent
arguments, named = torch.load(here / "inputs.pt", map_location="{device}")
results = function(*arguments, **named)
results = [x for x in results if x is not None] if isinstance(results, (tuple, list)) else [results][:{returned}]
results += [[*arguments, *named.values()][place] for place in {updated}]
for (name, exact, bound), result in zip(torch.load(here / "exact.pt"), results):
    error = (result.cpu().double() - exact).abs().nan_to_num(nan=float("inf"))
    wrong = int((exact.isfinite() & (error > bound)).sum())
    print(f"{{name}}: {{wrong}} of {{error.numel()}} are out of bounds; the largest error is {{max([0, *error.flatten().tolist()]):.4g}}")
'''


def write_archive(directory: Path, impl: OpImpl, case: Case, seed: int, device: torch.device) -> str:
    """Write a case's inputs, the exact results and the script. Returns the file's name, or why there is none."""
    call = case.draw(seed, device)
    size = sum(x.untyped_storage().nbytes() for x in call.tensors().values())
    if size > _LARGEST:
        return f"not written: its inputs are {size >> 20} MiB"
    lazy = impl.fn if isinstance(impl.fn, LazyFunction) else None
    module, function = (lazy.module, lazy.name) if lazy else (impl.function.__module__, impl.function.__qualname__)
    title = f"{impl.impl_id}: {case.op} {case.check} {case.name} {case.dtype}"
    grid = isinstance(lazy, KernelFunction) and not lazy.takes_grid
    return str(write_files(directory, title, module, function, device, _as_data(call, case, skipped=int(grid))))


def write_files(
    directory: Path, title: str, module: str, function: str, device: torch.device, data: dict[str, Any], text: str = ""
) -> Path:
    """Write an archive whose ``repeat.py`` calls a module's function and compares its results with the exact ones.

    Args:
        data: ``arguments`` and ``named``, as :func:`kept` returns them; ``updated``: the indices of those that are also results,
            positional ones first; ``returned``: 0 if what it returns does not count; ``exact``: for each result its name, the exact
            numbers, and the bound of each.
        text: a bug report for the function's maintainers.
    """
    file = directory / (re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-") + ".zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.pt", _saved((data["arguments"], data["named"])))
        archive.writestr("exact.pt", _saved(data["exact"]))
        script = _SCRIPT.format(
            title=title, module=module, function=function, device=device.type, updated=data["updated"], returned=data.get("returned", 1)
        )
        archive.writestr("repeat.py", script)
        if text:
            archive.writestr("report.txt", text)
    return file


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _as_data(call: Call, case: Case, skipped: int) -> dict[str, Any]:
    """Convert a call, without its first arguments, so that ``torch.load`` reads it. Strides are kept."""
    expected = OPERATORS_CHECKED[case.op].exact(call)
    arguments, named = call.arguments()
    arguments = arguments[skipped:]
    places = [*arguments, *named.values()]
    return {
        "arguments": [kept(x) for x in arguments],
        "named": {name: kept(x) for name, x in named.items()},
        "updated": [place for name in call.updated for place, x in enumerate(places) if x is call.inputs[name]],
        "returned": int(call.returns),
        "exact": [(one.name, one.value, one.bound(getattr(torch, case.dtype))) for one in expected if hasattr(one, "bound")],
    }


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
