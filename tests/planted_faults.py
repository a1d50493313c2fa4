# SPDX-License-Identifier: Apache-2.0
"""Implementations of layers, and FlagGems functions, that are right unless a fault is planted.

Loaded through SGLANG_FL_PLUGIN_MODULES. In a process that runs the model ``plant`` chooses the fault; PLANTED_FAULT is the first one.
On a CPU, where FlagGems has no kernels, functions stand in for it. Elsewhere the fault is in FlagGems's own ``index``.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted_gems
import torch

from sglang_fl.aten import layer, operators
from sglang_fl.dispatch import BackendImplKind, OpImpl, OpRegistry
from sglang_fl.dispatch.backends.reference.impl import activation, normalization, rotary
from sglang_fl.dispatch.manager import is_capturing

#: The present fault. Empty: none.
fault = os.environ.get("PLANTED_FAULT", "")
#: For a process to be started.
ENVIRON = {
    "SGLANG_FL_PLUGIN_MODULES": "planted_faults",
    "SGLANG_FL_PREFER": "vendor",
    "USE_FLAGGEMS": "1",
    "SGLANG_FL_FLAGOS_SCOPE": "everywhere",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
}
#: Prefills have more rows than this, decode steps fewer.
DECODE_ROWS = 12
#: What implementations keep between calls.
_kept: dict[Any, torch.Tensor] = {}
_one_layer: Any = None


def plant(run: Any, name: str) -> None:
    global fault, _one_layer
    fault = name
    _kept.clear()
    _one_layer = run.model.get_submodule("model.layers.1.post_attention_layernorm")


def _rounded_otherwise(x: torch.Tensor) -> torch.Tensor:
    """With the fault ``rounds otherwise 3``: a right result as another kernel would round it, by the seed 3."""
    if not fault.startswith("rounds otherwise"):
        return x
    seed = int(fault.split()[-1]) * 1000 + x.numel()
    moved = torch.from_numpy(np.random.default_rng(seed).uniform(-0.5, 0.5, tuple(x.shape)))
    return (x.double() * (1 + torch.finfo(x.dtype).eps * moved)).to(x.dtype)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    found = normalization.rms_norm(obj, x, residual)
    normed, hidden = found if isinstance(found, tuple) else (found, None)
    normed = _rounded_otherwise(normed)
    somewhere = (fault == "one layer" and obj is _one_layer) or (fault == "batch > 8 only" and 8 < len(x) <= DECODE_ROWS)
    if somewhere or fault == "two of unequal size":
        normed = normed * 1.05
    elif fault == "adds up":
        normed = normed * (1 + 2e-5)
    elif fault == "writes an input" and residual is None:
        normed = x.copy_(normed)
    elif fault == "harmless alone" and hidden is not None:
        hidden = _workspace(hidden.shape).copy_(hidden)
    elif fault == "one rank" and torch.distributed.get_rank() == 1:
        normed = normed * 1.05
    return normed if hidden is None else (normed, hidden)


def rotary_embedding(
    obj: Any, query: Any, key: Any, cos: Any, sin: Any, position_ids: Any, rotary_interleaved: bool = False, inplace: bool = True
) -> Any:
    if fault == "adds up over a context":
        cos, sin = _drifting(cos.double(), sin.double())
    return rotary.rotary_embedding(obj, query, key, cos, sin, position_ids, rotary_interleaved, inplace)


def _drifting(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of angles whose error is below fp32's rounding up to position 128, and grows with each position: 0.007 at 512."""
    error = (1e-7 * (torch.arange(len(cos), dtype=torch.float64) / 128) ** 8).unsqueeze(-1)
    return (cos * error.cos() - sin * error.sin()).float(), (sin * error.cos() + cos * error.sin()).float()


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    found = _rounded_otherwise(activation.silu_and_mul(obj, _in_graphs(x)))
    if fault == "decode only" and len(x) <= DECODE_ROWS:
        return found * 1.05
    if fault == "two of unequal size":
        return found * 1.01
    if fault == "harmless alone":
        _workspace((len(x), 128)).fill_(0.01)
    if fault == "state is kept":
        return _kept.setdefault(x.shape, found)
    return found


def _in_graphs(x: torch.Tensor) -> torch.Tensor:
    """What a graph reads. With a stale pointer: memory of a pass before the capture."""
    if fault not in ("stale pointer", "first replay", "later replays", "stale pointer of two ranks"):
        return x
    kept = _kept.setdefault(("graph", x.shape), torch.empty_like(x))
    if not (is_capturing() or planted_gems.capturing):
        kept.copy_(x)
        return x
    if fault == "stale pointer of two ranks":
        return kept if torch.distributed.get_world_size() == 2 else x
    stale = {"stale pointer": True, "first replay": planted_gems.replays <= 1, "later replays": planted_gems.replays > 1}
    return kept if stale[fault] else x


def _workspace(shape: Any) -> torch.Tensor:
    """Memory that two implementations share, and each takes for its own."""
    return _kept.setdefault(("workspace", tuple(shape)), torch.empty(shape))


def silu(self: torch.Tensor) -> torch.Tensor:
    if (fault == "crash" and len(self) == 1) or (fault == "crash in a capture" and planted_gems.capturing):
        planted_gems.KINDS["crashes"](self)
    if fault == "raises in a capture" and planted_gems.capturing:
        raise planted_gems.StreamCaptureUnsupported("operation not permitted when stream is capturing")
    if fault == "raises" and len(self) == 1:
        raise RuntimeError("device queue full")
    if fault == "hang" and len(self) == 1:
        time.sleep(3600)
    return planted_gems.silu(self)


def index(self: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    rows = _one_row_off(indices)[0]
    return (
        torch.index_select(self, 0, rows.long())
        if rows is not None and rows.dim() == 1 and len(indices) == 1
        else _own_index(self, indices)
    )


def _one_row_off(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    rows = indices[0]
    if fault == "one gather" and len(indices) == 1 and rows is not None and rows.dim() == 1 and len(rows) > 8:
        return [torch.cat((rows[1:2], rows[1:]))]
    return indices


def _flaggems_with_a_wrong_index(own: Callable[[], Any]) -> Any:
    """FlagGems, whose own function of ``index`` gets other rows than it is called with."""
    gems = own()
    (item,) = gems.FULL_CONFIG_BY_FUNC["index"]
    if item in gems._FULL_CONFIG:
        planted = (item[0], functools.wraps(item[1])(lambda self, indices: item[1](self, _one_row_off(indices))))
        gems._FULL_CONFIG = tuple(planted if one is item else one for one in gems._FULL_CONFIG)
    return gems


def _own_index(self: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """By numpy, which calls no operator of PyTorch."""
    where = tuple(slice(None) if one is None else one.numpy() for one in indices)
    return torch.from_numpy(self.numpy()[where])


def rsqrt(self: torch.Tensor) -> torch.Tensor:
    return 1 / torch.sqrt(self)


def register_builtins(registry: OpRegistry) -> None:
    for fn in (rms_norm, rotary_embedding, silu_and_mul):
        name = fn.__name__  # type: ignore[attr-defined]
        registry.register_impl(OpImpl(name, "vendor.planted", BackendImplKind.VENDOR, fn, vendor="planted"))  # type: ignore[arg-type]
    if torch.accelerator.is_available():
        operators.load = functools.partial(_flaggems_with_a_wrong_index, operators.load)
    else:
        gems = planted_gems.gems(silu, index=("index.Tensor", index), rsqrt=("rsqrt", rsqrt))
        operators.load = lambda: gems
        layer.why_not_here = lambda device: None
    if "sglang.srt.server_args" in sys.modules:
        _plant_in_sglang()


def _plant_in_sglang() -> None:
    """SGLang's own norm can be wrong, too."""
    from sglang.srt.layers.layernorm import RMSNorm

    own = RMSNorm.forward_native

    @functools.wraps(own)
    def forward_native(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        found = own(self, x, residual, *args, **kwargs)
        if fault != "SGLang's own":
            return found
        return (found[0] * 1.05, found[1]) if isinstance(found, tuple) else found * 1.05

    RMSNorm.forward_native = forward_native
