# SPDX-License-Identifier: Apache-2.0
"""How FlagGems's real tuner of ``mm`` behaves under our limits; the times that a device would give are made up."""

from collections import defaultdict
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from flaggems_here import gems

from sglang_fl.dispatch.backends.flaggems import tuning

__all__ = ["gems"]


@pytest.fixture
def tuner(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tuner of ``mm``, with nothing kept from before; ``timed`` and ``launched`` have the configurations in order."""
    libentry = import_module("flag_gems.utils.libentry")
    entry = import_module("flag_gems.runtime.backend._nvidia.hopper.ops.mm").mm_kernel_general
    found = entry.fn
    while not isinstance(found, libentry.LibTuner):
        found = found.fn
    launched: list[dict[str, Any]] = []
    timed: list[Any] = []

    def bench(*args: Any, config: Any, **kwargs: Any) -> list[float]:
        timed.append(config)
        return [1.0 if config is found.configs[1] else 2.0, 0.0, 0.0]

    monkeypatch.setattr(libentry, "libcache", defaultdict(dict))
    for name, value in {
        "cache": {},
        "_bench": bench,
        "timed": timed,
        "launched": launched,
        "prune_configs": lambda kwargs: found.configs,
    }.items():
        monkeypatch.setattr(found, name, value, raising=False)
    monkeypatch.setattr(found, "fn", SimpleNamespace(run=lambda *args, **kwargs: launched.append(kwargs)))
    monkeypatch.setattr(tuning, "_spent", 0.0)
    return found


def multiply(tuner: Any, rows: int) -> None:
    sizes = {"M": rows, "N": 4096, "K": 1024, "stride_am": 1024, "stride_bk": 4096}
    tuner.run(*(sizes.get(name, 1) for name in tuner.arg_names[: tuner.arg_names.index("BLOCK_M")]))


def test_numbers_of_tokens_up_to_a_power_of_two_are_tuned_together(tuner: Any) -> None:
    for rows in (*range(1, 9), *range(16, 257, 8), 8192):
        multiply(tuner, rows)
    # 1, 2, 4, 8, 16, 32, 64, 128, 256 and 8192
    assert len(tuner.cache) == 10 and len(tuner.timed) == 10 * len(tuner.configs)
    assert all(kwargs["BLOCK_M"] == tuner.configs[1].kwargs["BLOCK_M"] for kwargs in tuner.launched)


@pytest.mark.parametrize(("limit", "timed"), [("OF_A_KERNEL", 2), ("OF_A_PROCESS", 2)])
def test_tuning_ends(tuner: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: str, timed: int) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(tuning, limit, 1.0)
    multiply(tuner, 16)
    assert len(tuner.timed) == timed and len(tuner.cache) == 1
    assert "mm_kernel_general for" in caplog.text and f"(the limit): 2 of {len(tuner.configs)} configurations" in caplog.text


def test_nothing_is_tuned_inside_a_capture(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply(tuner, 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    multiply(tuner, 13)
    with pytest.raises(RuntimeError, match="has not tuned mm_kernel_general for these sizes"):
        multiply(tuner, 17)
    assert len(tuner.cache) == 1
