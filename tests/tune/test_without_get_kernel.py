# SPDX-License-Identifier: Apache-2.0
"""A PyTorch without torch.library.get_kernel: tune needs it nowhere, since native is measured with all FlagGems functions off."""

from collections.abc import Callable
from typing import Any

import planted_gems
import pytest
import torch

from sglang_fl.aten.operators import available_functions
from sglang_fl.config import Settings
from sglang_fl.tune.aten_calls import Recorder
from sglang_fl.tune.aten_case import Case, check, time

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_get_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.library, "get_kernel")


def case(silu: Callable[..., Any]) -> Case:
    """A call of silu as tune finds it: recorded, with FlagGems's function for it."""
    recorder = Recorder("cpu")
    with torch.inference_mode():
        recorder.start()
        torch.nn.functional.silu(torch.randn(3, 4))
        recorder.stop()
    (call,) = (call for call in recorder.calls() if call["key"] == "silu")
    with planted_gems.in_place_of_flaggems(planted_gems.gems(silu)):
        rows, dispatch_key = available_functions(Settings())
    return Case("silu", call["args"], call["kwargs"], [(key, fn) for key, fn in rows if fn.__name__ == "silu"], dispatch_key)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * planted_gems.silu(x)


@pytest.mark.parametrize("silu, right", [(planted_gems.silu, True), (doubled, False)])
def test_a_function_is_checked_against_pytorchs_own(silu: Callable[..., Any], right: bool) -> None:
    with torch.inference_mode():
        assert check(case(silu), CPU)["right"] is right


def test_native_is_computed_and_timed_with_the_function_off() -> None:
    found = case(doubled)
    with torch.inference_mode():
        call = found.build(0)
        assert torch.equal(found.run(call)[0], torch.nn.functional.silu(call.args[0])) and planted_gems.calls.get("silu", 0) == 0
        assert torch.equal(found.run(call, found.registered())[0], doubled(call.args[0])) and planted_gems.calls["silu"] == 1
        times = time(found, CPU, graphs=False, rounds=2)
    assert times["own"]["us"] and times["theirs"]["ratio"] and not times["own"]["error"]
