# SPDX-License-Identifier: Apache-2.0
"""The inputs of each operator: an entry of :data:`OPERATORS_CHECKED`, one file per family."""

from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

import torch

from ..constants import BATCH, COMPILE, GRAPH, INPUTS, REPEATS, SERVING, SIZES, SPECIAL, THREADS, UNUSUAL
from .call import Call, Case, NoMemory, Operator, rows_of

__all__ = ["OPERATORS_CHECKED", "Call", "Case", "NoMemory", "Operator", "cases_of"]

#: operator -> its inputs, from the ``OPERATORS`` of the files here.
OPERATORS_CHECKED: Mapping[str, Operator] = {
    op: operator
    for module in iter_modules(__path__)
    for op, operator in getattr(import_module(f"{__name__}.{module.name}"), "OPERATORS", {}).items()
}

#: The numbers of tokens to time: on an accelerator, on a CPU (about a minute), and with --quick (a few seconds).
_ACCELERATOR, _CPU, _QUICK = (1, 16, 64, 512, 2048, 8192), (1, 16, 64, 512, 2048), (1, 64)


def cases_of(
    op: str, dtypes: frozenset[torch.dtype] | None, device: torch.device, *, quick: bool, batch_invariant: bool = False
) -> Iterator[Case]:
    """An operator's cases for an implementation that declares these dtypes (None: all) and batch invariance."""
    operator, on_cpu = OPERATORS_CHECKED[op], device.type == "cpu"
    names = [str(dtype).removeprefix("torch.") for dtype in operator.dtypes if dtypes is None or dtype in dtypes]
    served = partial(_served, operator)
    tables = [(SERVING, served(*(_QUICK if quick else _CPU if on_cpu else _ACCELERATOR)))]
    tables += [(UNUSUAL, operator.unusual), (SPECIAL, operator.special), (INPUTS, served(33))]
    # A batch that fills the device reveals races between a kernel's threads.
    tables.append((REPEATS, served(256 if on_cpu or quick else 2048)))
    if batch_invariant:
        # Kernels use other code paths for larger batches.
        tables.append((BATCH, served(64 if quick else 512)))
    # Kernels are compiled anew for each dtype: what is about numbers of rows and heads stands in the one of serving.
    once = [(SIZES, operator.sizes), (SIZES, operator.many), *([] if on_cpu else [(SIZES, operator.vast)])]
    for number, dtype in enumerate(names):
        for check, table in [*tables, *(once if number == 0 else ())]:
            yield from (_case(op, check, words, dtype) for words in rows_of(table))
    for dtype in names[:1]:
        pairs = list(zip(rows_of(served(64)), rows_of(served(17)), strict=True))
        for check in (THREADS, GRAPH) if operator.captured else (THREADS,):
            yield from (_case(op, check, words, dtype, other) for words, other in pairs)
        # Compiling takes seconds, so only the first and the last form are compiled. Recurrences take minutes: never with --quick.
        compiled = pairs[:1] if quick else dict.fromkeys((pairs[0], pairs[-1]))
        for words, other in compiled if operator.compiled and (operator.tokens_in or not quick) else ():
            yield _case(op, COMPILE, words, dtype, None if on_cpu else other)


def _served(operator: Operator, *tokens: int) -> str:
    """The calls of serving with these numbers of tokens."""
    return " | ".join(f"tokens={max(1, count // operator.fewer)} {row}" for count in tokens for row in operator.forms.split("|"))


def _case(op: str, check: str, words: str, dtype: str, other: str | None = None) -> Case:
    form = OPERATORS_CHECKED[op].form.of(words)
    return Case(op, check, words, dtype, form, OPERATORS_CHECKED[op].form.of(other) if other else None)
