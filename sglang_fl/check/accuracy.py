# SPDX-License-Identifier: Apache-2.0
"""Whether the results are accurate, and how long a call takes compared with the reference."""

import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch

from .cases import OPERATORS_CHECKED, Call, Case
from .constants import SERVING
from .implementation import Function, Implementation, results
from .results import Outcome

#: If a tensor of a call has more numbers than this, only some tokens are compared with float64.
_JUDGED_WHOLE = 1 << 26

#: The rounds of the timing, and the minimum seconds of a round.
_ROUNDS, _LEAST = 5, 2e-3


def accuracy(impl: Implementation, case: Case, seed: int) -> Outcome:
    """Compare with float64. The sizes of serving are called as SGLang does, in PyTorch's inference mode, the others outside of it."""
    call = case.draw(seed, impl.device)
    tokens_in = OPERATORS_CHECKED[impl.op].tokens_in
    some = _some_tokens(call, tokens_in)
    expected = impl.exact(call if some is None else call.of_tokens(some, tokens_in))
    with torch.inference_mode() if case.check == SERVING else nullcontext():
        got = impl.run(call)
    if some is not None:
        return impl.compare(tuple(result[some] for result in got), expected, case)
    outcome = impl.compare(got, expected, case)
    if impl.reference is None:
        return replace(outcome, reference_ulp=outcome.error_ulp)
    reference = impl.verdict(results(impl.reference, case.draw(seed, impl.device)), expected, case)
    return replace(outcome, reference_ulp=reference.error_ulp)


def _some_tokens(call: Call, tokens_in: Mapping[str, int]) -> torch.Tensor | None:
    """The tokens to judge in a call that is too large for float64 and for the reference. None: all.

    The first and last ones, those where a 16-bit index overflows, and a thousand others in adjacent pairs.
    """
    largest = max((call.inputs[name] for name in tokens_in if name in call.inputs), key=torch.numel, default=None)
    if largest is None or largest.numel() <= _JUDGED_WHOLE:
        return None
    tokens = len(largest)
    spread = torch.linspace(0, tokens - 1, 513).long()
    some = torch.cat((spread, spread.clamp(max=tokens - 2) + 1, torch.arange(65530, 65540))).unique()
    return some[some < tokens].to(largest.device)


def speed(impl: Implementation, case: Case, seed: int) -> Outcome:
    """The time of the call and of the reference: medians of alternating rounds."""
    impl.run(case.draw(seed, impl.device))  # compiles it
    functions = [impl.fn] if impl.reference is None else [impl.fn, impl.reference]
    sides = [(fn, case.draw(seed, impl.device)) for fn in functions]
    counts = [max(1, round(_LEAST / _seconds(impl, fn, call, 3))) for fn, call in sides]
    rounds = [[_seconds(impl, fn, call, count) for (fn, call), count in zip(sides, counts, strict=True)] for _ in range(_ROUNDS)]
    times = [round(statistics.median(taken) * 1e6, 3) for taken in zip(*rounds, strict=True)]
    return Outcome(time_us=times[0], reference_us=times[-1])


def _seconds(impl: Implementation, fn: Function, call: Call, count: int) -> float:
    """Seconds per call, over ``count`` calls."""
    arguments, named = call.arguments()
    fn(*arguments, **named)
    impl.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        fn(*arguments, **named)
    impl.synchronize()
    return max(1e-9, (time.perf_counter() - start) / count)
