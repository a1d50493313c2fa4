# SPDX-License-Identifier: Apache-2.0
"""What failed on one rank goes back to PyTorch on all of them."""

import logging
from collections.abc import Sequence

from ..distributed.ranks import Ranks
from .operators import AtenOperators

logger = logging.getLogger("sglang_fl.aten")


def agree(operators: AtenOperators, ranks: Ranks) -> int:
    """At the end of a pass: exchange failures between ranks, and exclude what failed on any. Returns how many operators all ranks tried.

    Raises:
        RuntimeError: something failed, and ``strict`` is set.
    """
    trials = operators.trials
    assert trials is not None
    with trials.native():
        given = ranks.exchange((dict(trials.failures), len(trials.passed)))
    exclude(operators, ranks, [failures for failures, _ in given])
    return sum(count for _, count in given)


def exclude(operators: AtenOperators, ranks: Ranks, failures: Sequence[dict[str, str]]) -> None:
    """Give back to PyTorch what failed on any rank, and log it.

    Args:
        failures: of each rank; function -> what happened.

    Raises:
        RuntimeError: something failed, and ``strict`` is set.
    """
    assert operators.trials is not None
    before = len(operators.excluded)
    for rank, failed in enumerate(failures):
        for function, what in failed.items():
            if function in operators.excluded:
                continue
            reason = f"{what} on rank {rank}" if ranks.group is not None else what
            if operators.settings.strict:
                raise RuntimeError(f"sglang-fl: ATen operators: {function} {reason} (strict is set, so there is no fallback)")
            operators.exclude(function, reason)
            logger.log(ranks.level(logging.WARNING), "ATen operators: %s %s; using PyTorch's own kernel", function, reason)
    operators.trials.failures.clear()
    if len(operators.excluded) > before:
        operators.changed()
