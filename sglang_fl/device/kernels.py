# SPDX-License-Identifier: Apache-2.0
"""What runs in the place of a kernel that SGLang calls outside of its layers, as data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..utils.suggest import suggest


def refuse_unknown_fields(cls: type[Any], given: Iterable[str], instead: Mapping[str, str] | None = None) -> None:
    """Raises TypeError with the fields that a dataclass does not have, and the nearest of each, or what there is instead."""
    names = [field.name for field in fields(cls)]
    hints = {name: f"; {hint}" for name, hint in (instead or {}).items()}
    unknown = [f"unknown field {name!r}{hints.get(name) or suggest(name, names)}" for name in given if name not in names]
    if unknown:
        raise TypeError(f"{cls.__name__}: {'; '.join(unknown)}")


@dataclass(frozen=True)
class KernelReplacement:
    """A function in the place of a kernel of SGLang's.

    It is called with the arguments of SGLang's call as they are, by position and by name. Of a launch, ``kernel[grid](*args)``,
    Triton's own options (``num_warps``, ``num_stages``, …) are among them.

    Attributes:
        function: ``"module:function"``, imported at its first call.
        takes_grid: whether it gets the grid of a launch before the arguments: a tuple, or a function of the launch's named arguments.
        writes_inputs: whether a call may have written its inputs when it raises. Of one that may have, another takes over a
            call after a :class:`sglang_fl.dispatch.Refusal` only.
        batch_invariant: whether a row's result is the same, bit for bit, whatever else is in the batch. Only such run under
            ``--enable-deterministic-inference``.
    """

    function: str
    takes_grid: bool = False
    writes_inputs: bool = True
    batch_invariant: bool = False

    def __new__(cls, *args: Any, **given: Any) -> "KernelReplacement":
        refuse_unknown_fields(cls, given)
        return super().__new__(cls)


def replacement(given: str | KernelReplacement) -> KernelReplacement:
    """A declaration's entry: the function alone stands for one without the grid."""
    return KernelReplacement(given) if isinstance(given, str) else given


def target_problem(target: object) -> str | None:
    """Why nothing of SGLang's can have this name, or None."""
    module, colon, name = target.partition(":") if isinstance(target, str) else ("", "", "")
    parts = module.split(".")
    if parts[0] == "sglang" and len(parts) > 1 and colon and name.isidentifier() and all(part.isidentifier() for part in parts):
        return None
    return f"a kernel of SGLang's is written 'sglang.module:name', not {target!r}"
