# SPDX-License-Identifier: Apache-2.0
"""What runs in the place of a kernel that SGLang calls outside of its layers, as data."""

from dataclasses import dataclass


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
