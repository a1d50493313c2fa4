# SPDX-License-Identifier: Apache-2.0
"""Passes over the same tokens, in each rank: with some replacements on, traced, and with SGLang's results rounded differently."""

import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..dispatch.manager import is_capturing
from ..model_run import Batch, ModelRun, Replacement
from ..model_run.switches import AtenCall, LayerCall
from .exactly import float64_place
from .not_judged import refuse

Function = Callable[..., Any]

#: Sequences in a large batch, if --max-running-requests allows them: more than eight, where kernels choose other code paths.
_MANY = 12
_DECODED, _LONG = 4, 512
#: Tokens are drawn from this part of the vocabulary: special tokens are at its ends.
_DRAWN = 0.05, 0.95
_TRACE_BYTES = 4096
#: Named in a trace where no batch runs.
CAPTURE = "the capture of a graph"
#: The suffix of a batch's name when it runs again.
AGAIN = ", again"
PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + ",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does it take?\nAnswer:",
)


def batches(run: ModelRun, prompts: Sequence[str]) -> list[Batch]:
    """A batch of one, a large batch, and a long sequence. Random tokens follow each prompt, the same in each run.

    Args:
        prompts: texts, or token ids if there is no tokenizer. Empty: PROMPTS, or random tokens if there is no tokenizer.

    Raises:
        ValueError: a prompt is too long for the model, is empty, or is not a list of token ids.
    """
    rng = np.random.default_rng(0)
    size = int(run.runner.model_config.vocab_size)

    def drawn(count: int) -> list[int]:
        return [int(token) for token in rng.integers(int(size * _DRAWN[0]), int(size * _DRAWN[1]), count)]

    if run.tokenizer is not None:
        encoded = [list(run.tokenizer.encode(prompt)) for prompt in prompts or PROMPTS]
    else:
        encoded = [_token_ids(prompt, size) for prompt in prompts] or [drawn(24) for _ in PROMPTS]
    room = run.longest - _DECODED - 2
    for prompt, tokens in zip(prompts, encoded, strict=False):
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        if len(tokens) > room:
            raise ValueError(f"the prompt {prompt[:40]!r}… has {len(tokens)} tokens; at most {room} fit here")
    first = tuple(encoded[0] + drawn(_DECODED + 2))
    count = min(_MANY, int(run.runner.max_running_requests))
    many = [tuple(encoded[n % len(encoded)][: room // _MANY] + drawn(n % 5) + drawn(_DECODED + 2)) for n in range(count)]
    everything = [token for tokens in encoded for token in tokens]
    length = max(min(_LONG, room), len(encoded[0]))
    long = tuple((everything + drawn(length))[:length] + drawn(3))
    return [Batch("one", (first,), _DECODED), Batch(f"batch of {count}", tuple(many), _DECODED), Batch("long", (long,), 2)]


def _token_ids(prompt: str, size: int) -> list[int]:
    """Parse ``1 2 3`` or ``1,2,3``. Raises ValueError unless all are token ids below ``size``."""
    words = prompt.replace(",", " ").split()
    if not all(word.isascii() and word.isdigit() and int(word) < size for word in words):
        raise ValueError(
            f"the prompt {prompt[:40]!r} is not a list of token ids below {size} such as '1 2 3', which --skip-tokenizer-init needs"
        )
    return [int(word) for word in words]


def with_only(run: ModelRun, given: list[Batch], on: Collection[Replacement] | None, directory: str | None = None) -> dict[str, Any]:
    """Log-probabilities by batch with these on. None: with all that the settings select.

    Args:
        directory: a file in it names, for each rank, the running replacement, in case it raises an error, or the process crashes or hangs.
    """
    with run.switches.only(run.switches.replacements if on is None else on), _tracing(run, directory):
        return {batch.name: run.logprobs(batch) for batch in given}


def in_graphs(
    run: ModelRun, given: list[Batch], on: Collection[Replacement] | None, directory: str | None = None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Log-probabilities at the replay of SGLang's graphs, which are captured with these on.

    Args:
        directory: as in :func:`with_only`. During a replay no Python runs, so nothing is traced then.

    Returns:
        The phases that were replayed, and log-probabilities by batch; none if there are no graphs. Those of a batch's first run have
        its name. Those of its second run, with the same graphs, have its name and AGAIN.
    """
    found: dict[str, Any] = {}
    with run.switches.only(run.switches.replacements if on is None else on), _tracing(run, directory):
        try:
            for replays in ("", AGAIN) if run.capture_graphs(given) else ():
                found |= {f"{batch.name}{replays}": run.logprobs(batch) for batch in given}
            return run.replayed, found
        finally:
            run.drop_graphs()


def _tracing(run: ModelRun, directory: str | None) -> AbstractContextManager[None]:
    if directory is None:
        return nullcontext()
    trace = _Trace(Path(directory) / f"rank{run.rank}", run)
    return run.switches.observed(
        lambda call: trace.around(str(call.replacement), call.path, call.forward(None)),
        lambda call: trace.around(str(call.replacement), f"aten::{call.key}", call.registered),
    )


class _Trace:
    """A memory-mapped file with the name of the running replacement, or of one that raised an error. It survives a crash."""

    def __init__(self, path: Path, run: ModelRun):
        path.write_bytes(bytes(_TRACE_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _TRACE_BYTES)
        self._run = run
        self._names: list[bytes] = []

    def around(self, name: str, path: str, function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            batch, phase = self._run.phase if self._run.phase[0] else ("no batch", CAPTURE)
            depth = len(self._names)
            self._names.append(f"{name}\n{path}, {batch}, {phase}".encode()[: _TRACE_BYTES - 1])
            self._write()
            result = function(*args, **kwargs)
            if torch.accelerator.is_available() and not is_capturing():
                torch.accelerator.synchronize()  # so that a kernel's error is raised here, and not at the next kernel
            del self._names[depth:]  # and what raised an error that this call has handled
            self._write()
            return result

        return call

    def _write(self) -> None:
        self._memory[:] = (self._names[-1] if self._names else b"").ljust(_TRACE_BYTES, b"\0")


def read_trace(directory: Path, rank: int = 0) -> tuple[str, str] | None:
    """(replacement, where) that was running when a process ended or an error was raised: of this rank, or of the first that has one."""
    for file in sorted(directory.glob("rank*"), key=lambda file: (file.name != f"rank{rank}", file.name)):
        name, _, where = file.read_bytes().rstrip(b"\0").decode(errors="replace").partition("\n")
        if name:
            return name, where
    return None


def rounded_otherwise(run: ModelRun, given: list[Batch], ulps: Mapping[Replacement, float], seed: int) -> dict[str, Any]:
    """Log-probabilities on SGLang's and PyTorch's own functions. Up to ``ulps`` are added at random to the results of those replaced."""
    refuse(ulps)
    place = float64_place(torch.device(run.runner.device))
    generator = torch.Generator(place).manual_seed(seed)

    def move(x: torch.Tensor, most: float) -> torch.Tensor:
        drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=place)
        moved = x.to(place).double() * (1 + most * torch.finfo(x.dtype).eps * (2 * drawn - 1))
        return moved.to(x.dtype).to(x.device)

    quiet = False

    def moving(function: Function, most: float) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal quiet
            if quiet:
                return function(*args, **kwargs)
            quiet = True  # the operators that it calls are not rounded again
            try:
                given = {id(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
                result = function(*args, **kwargs)

                def each(x: torch.Tensor) -> torch.Tensor:
                    if not x.is_floating_point():
                        return x
                    return x.copy_(move(x, most)) if id(x) in given else move(x, most)

                return pytree.tree_map_only(torch.Tensor, each, result)
            finally:
                quiet = False

        return call

    def layer(call: LayerCall) -> Function:
        return moving(call.socket.own, ulps[call.replacement])

    def aten(call: AtenCall) -> Function:
        return moving(call.kernel, ulps[call.replacement]) if call.kernel is not None else call.registered

    with run.switches.only(ulps), run.switches.observed(layer, aten):
        return {batch.name: run.logprobs(batch) for batch in given}
