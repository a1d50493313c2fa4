# SPDX-License-Identifier: Apache-2.0
"""ATen calls that are recorded, checked and timed, with functions of PyTorch's in FlagGems's place."""

import gc
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_fl.tune import aten_case
from sglang_fl.tune.aten_calls import Recorder, describe, heaviest, telling
from sglang_fl.tune.aten_case import Case, NotMeasurable, check, time

CPU = torch.device("cpu")


def tensor(*shape: int, dtype: str = "float32", stride: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"shape": list(shape), "stride": list(stride or torch.empty(shape).stride()), "dtype": dtype, "device": "cpu"}


def case(key: str, args: list[Any], function: Callable[..., Any], **kwargs: Any) -> Case:
    return Case(key, args, kwargs, [(key, function)], "CPU")


@pytest.fixture
def calls() -> Callable[[Callable[[], Any]], dict[str, list[Any]]]:
    """The recorded arguments of what a function calls, by operator."""
    recorder = Recorder("cpu")

    def record(function: Callable[[], Any]) -> dict[str, list[Any]]:
        with torch.inference_mode(), recorder:
            function()
        return {name: [(args, dict(kwargs)) for n, args, kwargs in recorder.counts if n == name] for name, *_ in recorder.counts}

    return record


def test_what_composite_operators_call_is_recorded(calls: Any) -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    assert {"linear", "mm"} <= set(calls(lambda: torch.nn.functional.linear(x, w)))
    assert {"_to_copy", "copy_"} <= set(calls(lambda: x.to(torch.bfloat16)))


def test_a_number_that_one_kernel_gives_another_is_no_error(calls: Any) -> None:
    assert "pow.Tensor_Tensor_out" in calls(lambda: 2.0 ** torch.arange(3.0))


def test_recorded_calls_can_be_made_again() -> None:
    recorder = Recorder("cpu")
    x = torch.randn(4, 8).t()
    with torch.inference_mode(), recorder:
        x.masked_fill(x > 0, -float("inf"))
        torch.cat([x, x], dim=1)
        x.to(torch.bfloat16)
    recorded = recorder.calls()
    assert recorded and all(call["counts"] == {"": 1} for call in recorded)
    for call in recorded:
        made = case(call["key"], call["args"], torch.mul, **call["kwargs"])
        made.run(made.build(0))
    (masked,) = (call for call in recorded if call["key"] == "masked_fill.Scalar")
    assert masked["args"][2] == {"float": "-inf"}
    assert describe(masked["args"], {}) == "8x4 fp32 strided on the host, 8x4 bool strided on the host, -inf"


def test_right_results_pass_and_are_timed() -> None:
    added = case("add.Tensor", [tensor(4, 8, dtype="bfloat16"), 2.0], lambda a, b, alpha=1: torch.sub(a, b, alpha=-alpha))
    with torch.inference_mode():
        assert check(added, CPU)["right"] is True
        timing = time(added, CPU, graphs=False, rounds=2)
    assert timing["own"]["us"] and timing["theirs"]["ratio"] and timing["theirs"]["error"] is None


def test_no_tensor_stays_after_a_call() -> None:
    added = case("add_.Tensor", [tensor(4, 8), tensor(4, 8)], lambda a, b: a.copy_(a + b))

    def tensors() -> int:
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    def measure() -> None:
        with torch.inference_mode():
            assert check(added, CPU)["right"] is True
            time(added, CPU, graphs=False, rounds=2)

    measure()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        measure()
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("key", "args", "function"),
    [
        ("add.Tensor", [tensor(4, 8), tensor(4, 8)], lambda a, b: torch.sub(a, b)),
        ("add_.Tensor", [tensor(4, 8), tensor(4, 8)], lambda a, b: a),
        ("add.Tensor", [tensor(4, 8), tensor(8)], lambda a, b: (a.double() - (-b.double()))[:2]),
        ("argmax", [tensor(4, 800), -1], lambda a, dim: torch.topk(a, 2, dim)[1][:, 1]),
        ("log", [tensor(4)], lambda a: 1 / 0),
        ("eq.Scalar", [tensor(40, dtype="int64"), 1], lambda a, b: torch.ne(a, b)),
    ],
)
def test_wrong_results_are_found(key: str, args: list[Any], function: Callable[..., Any]) -> None:
    with torch.inference_mode():
        found = check(case(key, args, function), CPU)
    assert found["right"] is False and found["why"]


def test_equal_values_may_be_found_in_another_place() -> None:
    ties = [tensor(4, 900, dtype="bfloat16"), -1]
    with torch.inference_mode():
        assert check(case("argmax", ties, lambda a, dim: torch.topk(a, 1, dim)[1].squeeze(dim)), CPU)["right"] is True


def test_places_are_in_bounds_and_not_twice_the_same() -> None:
    put = case("index_put_", [tensor(40, 8), [tensor(30, dtype="int64")], tensor(30, 8)], lambda x, i, v: x.index_copy_(0, i[0], v))
    call = put.build(0)
    places = call.args[1][0]
    assert places.unique().numel() == 30 and places.max() < 40
    assert call.written == [call.args[0]]
    with torch.inference_mode():
        assert check(put, CPU)["right"] is True
    few = case("embedding", [tensor(1, 8), tensor(30, dtype="int64")], torch.mul)
    assert few.build(0).args[1].max() == 0


def test_random_results_cannot_be_compared() -> None:
    with torch.inference_mode():
        assert check(case("exponential_", [tensor(5)], lambda x: x.fill_(1.0)), CPU)["right"] is None


@pytest.mark.parametrize("error", ["not permitted", aten_case.CaptureStateLost("the process captures no more")])
def test_what_pytorch_cannot_capture_either_is_no_fault_of_flaggems(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def replay_error(case: Case, active: Any, **_: Any) -> str:
        assert active is aten_case.nullcontext, "only PyTorch's own call is captured"
        if isinstance(error, Exception):
            raise error
        return str(error)

    monkeypatch.setattr(aten_case, "graphs_of", lambda device: object())
    monkeypatch.setattr(aten_case, "_replay_error", replay_error)
    found = check(case("add.Tensor", [tensor(4, 8), 2.0], lambda a, b, alpha=1: torch.sub(a, b, alpha=-alpha)), CPU)
    assert found["right"] is True and "graph_safe" not in found and found.get("lost", False) is isinstance(error, Exception)


def test_a_copy_to_the_host_is_told_from_one_that_stays() -> None:
    x = {**tensor(4), "device": "cuda"}
    assert [describe([x], {"device": {"device": name}}) for name in ("cpu", "cuda")] == ["4 fp32, to the host", "4 fp32"]
    assert describe([tensor(4)], {"device": {"device": "cpu"}}) == "4 fp32 on the host"


def test_what_cannot_be_made_again_says_so() -> None:
    with pytest.raises(NotMeasurable, match="self was a Sparse"):
        case("add.Tensor", [{"other": "Sparse"}, 1], torch.mul).build(0)


def test_of_each_step_the_calls_are_tried_that_take_longest() -> None:
    def call(size: int, **counts: int) -> dict[str, Any]:
        return {"args": [tensor(size)], "kwargs": {}, "counts": counts}

    small, large, wide, rare = call(8, decode=400), call(8_000_000, prefill=2, decode=2), call(4_000_000, prefill=3), call(4, other=9)
    calls = [rare, small, wide, large]
    assert heaviest(calls, ["decode", "prefill"], 8) == [small, large, wide]
    assert heaviest(calls, ["prefill", "decode"], 1) == [large]
    assert heaviest(calls, [], 8) == []


def test_the_most_telling_calls_are_tried() -> None:
    calls = [{"key": "neg", "args": [tensor(n, 4)], "kwargs": {}} for n in range(1, 10)]
    calls.append({"key": "neg", "args": [tensor(3)], "kwargs": {}})
    assert [call["args"][0]["shape"] for call in telling(calls, 3)] == [[9, 4], [3], [1, 4]]


def test_a_result_that_is_not_the_same_again_is_wrong() -> None:
    turns = itertools.count()
    found = check(case("neg", [tensor(4, 8)], lambda x: torch.mul(x, -1 - 1e-7 * (next(turns) % 2))), CPU)
    assert found["right"] is False and "differs from run to run" in found["why"]


def test_operators_that_pytorch_takes_apart_early_are_recorded_whole() -> None:
    """FlagGems has a ``pad``, and PyTorch calls it instead of taking ``pad`` apart into ``constant_pad_nd``."""
    code = (
        "import torch; from sglang_fl.tune.aten_calls import Recorder; recorder = Recorder('cpu'); recorder.start()\n"
        "with torch.no_grad(): print(torch.nn.functional.pad(torch.ones(2), (1, 0)).tolist())\n"
        "recorder.stop(); print([call['key'] for call in recorder.calls()])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[0] == "[0.0, 1.0, 1.0]" and "'pad'" in printed[1] and "'constant_pad_nd'" in printed[1]
