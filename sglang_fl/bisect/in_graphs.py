# SPDX-License-Identifier: Apache-2.0
"""Finds where graph replays change log-probabilities: in prefill or decode, in the first or later replays, and in which batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..model_run import Batch
from .passes import AGAIN
from .trials import Effect, beyond

Logprobs = Mapping[str, Any]


def differences(native: Logprobs, other: Logprobs, noise: Effect, batches: Sequence[Batch], replayed: Sequence[str]) -> str:
    """Describe the differences in one sentence.

    Args:
        native, other: results of :func:`.passes.in_graphs`.
        noise: differences within it are ignored.
        replayed: the phases whose graphs were replayed: ``prefill``, ``decode``, or both.
    """
    steps = {name: _changed(native[name], other[name], noise) for name in native}
    phase = "decode" if "decode" in replayed else "prefill"
    if "prefill" in replayed and any(0 in changed for changed in steps.values()):
        phase = "prefill"
    seen = [batch.name for batch in batches if steps[batch.name] or steps[batch.name + AGAIN]]
    return f"It is seen in {phase}, {_replays(steps, batches, phase)} (batches: {', '.join(seen)})."


def _changed(native: Any, other: Any, noise: Effect) -> set[int]:
    """The steps that differ by more than the noise, or by inf or nan. 0 is the prefill."""
    off = np.abs(np.nan_to_num(np.asarray(other) - native, nan=np.inf, posinf=np.inf, neginf=np.inf)).max(-1)
    return {int(step) for step in np.flatnonzero(off > beyond(noise.worst))}


def _replays(steps: Mapping[str, set[int]], batches: Sequence[Batch], phase: str) -> str:
    again = any(changed for name, changed in steps.items() if name.endswith(AGAIN))
    if not again:
        return "only in the first replays"
    first = list(_first_replays(batches, phase))
    return "in every replay" if any(step in steps[name] for name, step in first) else "only in replays after the first"


def _first_replays(batches: Sequence[Batch], phase: str) -> Iterator[tuple[str, int]]:
    """(batch, step) of each first replay of a graph. All batches with the same number of sequences share a decode graph."""
    sizes: set[int] = set()
    for batch in batches:
        if phase == "prefill":
            yield batch.name, 0
        elif len(batch.sequences) not in sizes:
            yield batch.name, 1
        sizes.add(len(batch.sequences))
