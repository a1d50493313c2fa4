# SPDX-License-Identifier: Apache-2.0
"""Runs one implementation on one case."""

from collections.abc import Callable
from dataclasses import replace

import torch

from .accuracy import accuracy, speed
from .cases import OPERATORS_CHECKED, Case, NoMemory
from .cases.call import INT32
from .constants import BATCH, COMPILE, FAILED, GRAPH, INPUTS, NO_MEMORY, REFUSED, REPEATS, SERVING, SIZES, SKIPPED, SPEED, THREADS
from .contract import batch_invariance, inputs_and_results, repeats, threads
from .graphs import compilation, graph_capture
from .implementation import Implementation, Refused, Violation
from .results import Outcome
from .shared_state import restore, shared_state

#: Kind of check -> its function. The other kinds are about accuracy.
_CHECKS: dict[str, Callable[[Implementation, Case, int], Outcome]] = {
    INPUTS: inputs_and_results,
    REPEATS: repeats,
    THREADS: threads,
    GRAPH: graph_capture,
    COMPILE: compilation,
    BATCH: batch_invariance,
    SPEED: speed,
}


def check_case(impl: Implementation, case: Case, seed: int) -> Outcome:
    """Run a case. Catches every error of the implementation that does not end the process."""
    before = shared_state()
    outcome = _outcome(impl, case, seed)
    changes = restore(before)
    if not changes:
        return outcome
    message = f"it changed process-wide state of PyTorch: {', '.join(changes)}"
    return replace(outcome, status=FAILED, message="; ".join(filter(None, (outcome.message, message))))


def _outcome(impl: Implementation, case: Case, seed: int) -> Outcome:
    try:
        outcome = _CHECKS.get(case.check, accuracy)(impl, case, seed)
        impl.synchronize()
    except NoMemory as error:
        return Outcome(SKIPPED, str(error))
    except Violation as error:
        return Outcome(FAILED, str(error))
    except Refused as refused:
        # What serving needs must work in the dtype of serving, and nothing may raise for want of tokens.
        # No model has rows that far apart, or as many numbers as int32 cannot count.
        served = case.check == SERVING or (case.check == SIZES and "far" not in case.name)
        must = served and getattr(torch, case.dtype) == OPERATORS_CHECKED[impl.op].dtypes[0] and max(refused.counts) < INT32
        return Outcome(FAILED if must or not all(refused.counts) else REFUSED, f"refused: {refused}")
    except torch.OutOfMemoryError as error:
        return Outcome(NO_MEMORY, str(error))
    except Exception as error:
        return impl.failed(f"raised {type(error).__name__}: {error}")
    return outcome
