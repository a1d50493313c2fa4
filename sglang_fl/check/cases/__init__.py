# SPDX-License-Identifier: Apache-2.0
"""What implementations are called with. An operator is one entry of :data:`OPERATORS_CHECKED`, from a file a family."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from ..constants import BATCH, COMPILE, GRAPH, INPUTS, REPEATS, SERVING, SPECIAL, THREADS, UNUSUAL
from ..exact.judge import DTYPES
from . import activation, gated_delta_rule, moe, normalization, rotary
from .call import Call, Case, Operator

__all__ = ["OPERATORS_CHECKED", "Call", "Case", "Operator", "cases_of"]

#: operator -> what it is checked with. A new operator needs an entry here and nothing else.
OPERATORS_CHECKED: Mapping[str, Operator] = {
    **activation.OPERATORS,
    **normalization.OPERATORS,
    **rotary.OPERATORS,
    **moe.OPERATORS,
    **gated_delta_rule.OPERATORS,
}

#: Tokens and hidden sizes: the full range on an accelerator, as much work as a CPU does in a minute, and a few seconds' worth.
_ACCELERATOR = ((1, 1024), (1, 4096), (16, 4096), (64, 8192), (512, 5120), (2048, 2048), (8192, 1024))
_CPU = ((1, 1024), (1, 4096), (16, 4096), (64, 2048), (512, 1024), (2048, 512), (8192, 256))
_QUICK = ((1, 1024), (64, 512))


def cases_of(
    op: str, dtypes: frozenset[torch.dtype] | None, device: torch.device, *, quick: bool, batch_invariant: bool = False
) -> Iterator[Case]:
    """An operator's cases, for what an implementation declares: the activation dtypes that it takes (None: all), batch invariance."""
    operator = OPERATORS_CHECKED[op]
    on_cpu = device.type == "cpu"
    sizes = _QUICK if quick else _CPU if on_cpu else _ACCELERATOR
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES if dtypes is None or dtype in dtypes]
    names.sort(key=lambda name: name != "bfloat16")  # the dtype of serving first
    for dtype in names:
        case = partial(Case, op, dtype=dtype)
        for tokens, hidden in sizes:
            yield from (case(SERVING, name, make=make) for name, make in operator.forms(tokens, hidden))
        yield from (case(UNUSUAL, name, make=make) for name, make in operator.unusual())
        yield from (case(SPECIAL, name, make=make) for name, make in operator.special())
        yield from (case(INPUTS, name, make=make) for name, make in operator.forms(33, 1024))
        # In a batch that fills the device a race between a kernel's threads shows.
        busy = (256, 512) if on_cpu or quick else (8192, 4096)
        yield from (case(REPEATS, name, make=make) for name, make in operator.forms(*busy))
        if batch_invariant:
            # Kernels take other ways for larger batches.
            yield from (case(BATCH, name, make=make) for name, make in operator.forms(*(64, 512) if quick else (512, 1024)))
    for dtype in names[:1]:
        case = partial(Case, op, dtype=dtype)
        pairs = list(zip(operator.forms(64, 1024), operator.forms(17, 1024), strict=True))
        for check in (THREADS, GRAPH) if operator.captured else (THREADS,):
            yield from (case(check, name, make=make, other=other) for (name, make), (_, other) in pairs)
        # A compilation takes seconds: the plainest call and the one with most to get wrong.
        for (name, make), (_, other) in pairs[:1] if quick else {id(pair): pair for pair in (pairs[0], pairs[-1])}.values():
            yield case(COMPILE, name, make=make, other=None if on_cpu else other)
