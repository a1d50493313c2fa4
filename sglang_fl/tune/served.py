# SPDX-License-Identifier: Apache-2.0
"""The measurements of an engine: prefill and decode at several batch sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import Engine

#: The time of decode steps is the difference of two runs. The shorter one generates this many tokens.
FIRST_TOKENS = 8
#: Reserve per prompt: the largest page size of SGLang's attention backends.
_PAGE = 64


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt for prefill and for decode, and the decode steps that are timed."""

    prefill: int
    decode: int
    output: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max(self.prefill + 1, self.decode + FIRST_TOKENS + self.output)


@dataclass(frozen=True)
class Case:
    """A phase at a batch size."""

    phase: str
    batch: int

    def __str__(self) -> str:
        return f"{self.phase}/{self.batch}"

    def tokens(self, lengths: Lengths) -> int:
        """The number of tokens processed in the measured time."""
        return self.batch * lengths.prefill if self.phase == "prefill" else self.batch

    def measure(self, engine: Engine, prompts: Sequence[Sequence[int]], lengths: Lengths) -> dict[str, Any]:
        """Seconds of a batch's prefill, or of one decode step.

        Args:
            prompts: one for each sequence of the batch, and as many with other beginnings.
        """
        prompts, others = prompts[: self.batch], prompts[self.batch :]
        if self.phase == "prefill":
            return _generate(engine, prompts, 1, before=[prompt[: lengths.decode] for prompt in others])
        # Not timed: an engine that was stopped has cold caches, which would slow only the shorter run.
        _generate(engine, [prompt[: lengths.decode] for prompt in others], FIRST_TOKENS)
        short = _generate(engine, prompts, FIRST_TOKENS)
        long = _generate(engine, prompts, FIRST_TOKENS + lengths.output)
        return {
            "seconds": (long["seconds"] - short["seconds"]) / lengths.output,
            "cached_tokens": short["cached_tokens"] + long["cached_tokens"],
        }

    def prompts(self, vocabulary: int, lengths: Lengths, seed: Sequence[int]) -> list[list[int]]:
        """What :meth:`measure` needs."""
        return make_prompts(vocabulary, 2 * self.batch, getattr(lengths, self.phase), seed)

    def show(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
        """What is measured, once and untimed."""
        _generate(engine, prompts[: self.batch], 1 if self.phase == "prefill" else FIRST_TOKENS)


def labels_of(cases: Sequence[Case], outside: bool) -> list[str]:
    """The steps in which calls are recorded; with ``outside`` also what is called there outside of the model's forward."""
    return [label for case in map(str, cases) for label in ((case, f"{case} outside") if outside else (case,))]


def _generate(
    engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int, before: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    engine.ask("flush")
    if before is not None:
        # SGLang returns the allocator's free memory when it flushes. A short prefill of an equally large batch
        # allocates it again, so that this is not measured. (In a decode step it cancels out.)
        engine.ask("generate", input_ids=before, max_new_tokens=1)
    return engine.ask("generate", input_ids=prompts, max_new_tokens=max_new_tokens)


def cases(batches: Sequence[int]) -> list[Case]:
    return [Case(phase, batch) for phase in ("prefill", "decode") for batch in batches]


def pool_tokens(batches: Sequence[int], lengths: Lengths, single: int) -> int:
    """The number of tokens that an engine's KV cache must hold for all measurements.

    Args:
        single: the tokens of the longest sequence that runs alone.
    """
    return max(max(batches) * (lengths.longest + _PAGE), single + _PAGE) + _PAGE


def make_prompts(vocabulary: int, batch: int, length: int, seed: Sequence[int]) -> list[list[int]]:
    """Random token ids. Each prompt begins with another token, so that no two share a prefix."""
    generator = np.random.default_rng(list(seed))
    prompts = generator.integers(0, vocabulary, (batch, length))
    prompts[:, 0] = generator.choice(vocabulary, batch, replace=False)
    return [[int(token) for token in prompt] for prompt in prompts]
