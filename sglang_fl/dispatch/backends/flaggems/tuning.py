# SPDX-License-Identifier: Apache-2.0
"""How FlagGems tunes kernels: once per chip and version, with a time limit, and not for each number of tokens.

FlagGems times every configuration of some kernels (``mm``, the chunked gated delta rule, reductions) at the first call with new sizes,
and keeps what it found in ``~/.flaggems/config_cache`` (``FLAGGEMS_CACHE_DIR``), a file for each chip and Triton. As it comes, each of
the 58 numbers of tokens that SGLang captures is a new size of ``mm``, tuning takes as long as it takes, and inside a capture it fails.
"""

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("sglang_fl.flaggems")

#: Seconds after which no further configuration is timed: for one size of a kernel, and in a process.
OF_A_KERNEL, OF_A_PROCESS = 5.0, 25.0

_spent = 0.0


@contextmanager
def keeping_results() -> Iterator[None]:
    """While FlagGems is imported: what Triton's own tuner finds for FlagGems's kernels is kept in Triton's cache."""
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    tuning = getattr(knobs, "autotuning", None)
    if tuning is None:  # Triton before 3.4
        yield
        return
    with tuning.scope():
        tuning.cache = True
        yield


def limit(libtuner: Any) -> None:
    """Change FlagGems's class ``LibTuner`` as this module's text says."""
    if libtuner.get("default").policy is _best_in_time:
        return
    of_all_sizes = libtuner.get_key

    def get_key(self: Any, args: dict[str, Any]) -> Any:
        rows = args.get("M") if "M" in self.keys else None
        return of_all_sizes(self, {**args, "M": 1 << (rows - 1).bit_length()} if isinstance(rows, int) and rows > 1 else args)

    libtuner.get_key = get_key
    libtuner.get("default").policy = _best_in_time


def _best_in_time(
    tuner: Any, times_of: Callable[[Any], list[float]], configs: Sequence[Any], args: Any, kwargs: Any
) -> tuple[Any, dict[Any, list[float]]]:
    """The fastest configuration of those that could be timed, and their times.

    Raises:
        RuntimeError: a graph is being captured, in which nothing can be timed.
    """
    global _spent
    if _is_capturing():
        raise RuntimeError(
            f"FlagGems has not tuned {tuner.__name__} for these sizes, and cannot during a graph capture: call it with them first"
        )
    # What was best for other sizes goes first: when the time is up, it is what there is.
    configs = sorted(configs, key=lambda config: config is not getattr(tuner, "best_config", None))
    logger.info("FlagGems tunes %s: up to %d configurations; the result is cached for the next start", tuner.__name__, len(configs))
    begin = time.monotonic()
    end = begin + min(OF_A_KERNEL, OF_A_PROCESS - _spent)
    found: dict[Any, list[float]] = {}
    for config in configs:
        found[config] = times_of(config)
        if time.monotonic() > end and min(found.values())[0] != float("inf"):
            break
    took = time.monotonic() - begin
    _spent += took
    if len(found) < len(configs):
        message = "FlagGems tuned %s for %.0f s (the limit): %d of %d configurations; the best of them is cached in FLAGGEMS_CACHE_DIR"
        logger.warning(message, tuner.__name__, took, len(found), len(configs))
    return min(found, key=lambda config: found[config]), found


def _is_capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
