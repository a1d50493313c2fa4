# SPDX-License-Identifier: Apache-2.0
"""An archive with the inputs of a case, and a script that repeats it with PyTorch and the kernel's package."""

import io
import re
import zipfile
from collections.abc import Mapping
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

import types
import torch
from {module} import {function} as function
torch.serialization.add_safe_globals([types.SimpleNamespace])
arguments, named = torch.load(__file__.replace("repeat.py", "inputs.pt"), map_location="{device}")
returned = function(*arguments, **named)
results = {results}
for (name, exact, bound), result in zip(torch.load(__file__.replace("repeat.py", "exact.pt")), results):
    off = (result.cpu().double() - exact).abs().nan_to_num(nan=float("inf")).flatten()
    print(f"{{name}}: {{(off > bound).sum()}} of {{len(off)}} are out of bounds; the largest error is {{max([0, *off.tolist()]):.4g}}")
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
        # What must be nan or infinite is not counted.
        exact = [(name, value, bound.where(value.isfinite(), torch.inf).flatten()) for name, value, bound in data["exact"]]
        archive.writestr("exact.pt", _saved(exact))
        script = _SCRIPT.format(title=title, module=module, function=function, device=device.type, results=_results(data))
        archive.writestr("repeat.py", script)
        if text:
            archive.writestr("report.txt", text)
    return file


def _results(data: Mapping[str, Any]) -> str:
    """An expression for the results: what the function returned, and the arguments that it wrote."""
    places = [f"arguments[{place}]" for place in range(len(data["arguments"]))] + [f"named[{name!r}]" for name in data["named"]]
    written = f"[{', '.join(places[place] for place in data['updated'])}]"
    if not data.get("returned", 1):
        return written
    returned = "[x for x in (returned if isinstance(returned, (tuple, list)) else [returned]) if x is not None]"
    return f"{returned} + {written}" if data["updated"] else returned


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
