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

from ..dispatch.types import LazyFunction, OpImpl
from .cases import OPERATORS_CHECKED, Call, Case
from .exact.judge import Exact

#: Larger inputs are not written. In bytes.
_LARGEST = 256 << 20

_SCRIPT = '''"""{title}

Unpack the archive, and run ``python repeat.py`` where PyTorch and the package of {module} are installed.
"""

import importlib
import pathlib
import types

import torch

MODULE, FUNCTION, DEVICE = "{module}", "{function}", "{device}"


def placed(x):
    if isinstance(x, dict) and "storage" in x:
        return x["storage"].to(DEVICE).as_strided(x["size"], x["stride"], x["offset"])
    if isinstance(x, dict) and "attributes" in x:
        return types.SimpleNamespace(**{{name: placed(value) for name, value in x["attributes"].items()}})
    return [placed(one) for one in x] if isinstance(x, list) else x


data = torch.load(pathlib.Path(__file__).with_name("inputs.pt"), weights_only=True)
arguments = [placed(x) for x in data["arguments"]]
named = {{name: placed(x) for name, x in data["named"].items()}}
result = getattr(importlib.import_module(MODULE), FUNCTION)(*arguments, **named)
results = [x for x in result if x is not None] if isinstance(result, (tuple, list)) else [result]
results += [arguments[place] for place in data["updated"]]
for name, exact, bound in data["exact"]:
    error = (results.pop(0).cpu().double() - exact).abs()
    wrong = ~(error <= bound) & exact.isfinite()
    largest = float(error.nan_to_num().max()) if error.numel() else 0.0
    print(f"{{name}}: {{int(wrong.sum())}} of {{wrong.numel()}} are out of bounds; the largest error is {{largest:.4g}}")
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
    return str(write_files(directory, title, module, function, device, _as_data(call, case)))


def write_files(
    directory: Path, title: str, module: str, function: str, device: torch.device, data: dict[str, Any], text: str = ""
) -> Path:
    """Write an archive whose ``repeat.py`` calls a module's function and compares its results with the exact ones.

    Args:
        data: ``arguments`` and ``named``, as :func:`kept` returns them; ``updated``: the indices of arguments that are also results;
            ``exact``: for each result its name, the exact numbers, and the bound of each.
        text: a bug report for the function's maintainers.
    """
    saved = io.BytesIO()
    torch.save(data, saved)
    file = directory / (re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-") + ".zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.pt", saved.getvalue())
        archive.writestr("repeat.py", _SCRIPT.format(title=title, module=module, function=function, device=device.type))
        if text:
            archive.writestr("report.txt", text)
    return file


def _as_data(call: Call, case: Case) -> dict[str, Any]:
    """Convert a value so that ``torch.load`` reads it with ``weights_only``. Strides are kept."""
    expected = OPERATORS_CHECKED[case.op].exact(call)
    arguments, named = call.arguments()
    return {
        "arguments": [kept(x) for x in arguments],
        "named": {name: kept(x) for name, x in named.items()},
        "updated": [place for name in call.updated for place, x in enumerate(arguments) if x is call.inputs[name]],
        "exact": [(one.name, one.value, one.bound(one.dtype or getattr(torch, case.dtype))) for one in expected if isinstance(one, Exact)],
    }


def kept(value: Any) -> Any:
    """Convert an argument for ``torch.load`` with ``weights_only``: a tensor with its strides, an object with its attributes."""
    if isinstance(value, (list, tuple)):
        return [kept(one) for one in value]
    if isinstance(value, (SimpleNamespace, nn.Module)):
        held = {**vars(value), **(value._parameters if isinstance(value, nn.Module) else {})}
        return {"attributes": {name: kept(one) for name, one in held.items() if not name.startswith("_")}}
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    storage = value.as_strided((size,), (1,), 0).cpu()
    return {"storage": storage, "size": list(value.shape), "stride": list(value.stride()), "offset": value.storage_offset()}
