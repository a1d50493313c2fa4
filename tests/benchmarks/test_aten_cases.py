# SPDX-License-Identifier: Apache-2.0
"""benchmarks/aten.py, aten_cases.py and record_aten.py, with functions of PyTorch's in FlagGems's place."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aten
import pytest
import result_file
import torch
from aten_cases import Case, NotMeasurable, check, time
from record_aten import Recorder

CPU = torch.device("cpu")
BENCHMARKS = Path(aten.__file__).parent


def tensor(*shape: int, dtype: str = "float32", stride: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"shape": list(shape), "stride": list(stride or torch.empty(shape).stride()), "dtype": dtype, "device": "cpu"}


def case(key: str, args: list[Any], function: Callable[..., Any], **kwargs: Any) -> Case:
    return Case(key, args, kwargs, [(key, function)], "CPU")


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[Callable[[], Any]], dict[str, list[Any]]]:
    """The recorded arguments of what a function calls, by operator."""
    recorder = Recorder(tmp_path / "calls.json", "cpu")

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


def test_recorded_calls_can_be_made_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "calls.json", "cpu")
    x = torch.randn(4, 8).t()
    with torch.inference_mode(), recorder:
        x.masked_fill(x > 0, -float("inf"))
        torch.cat([x, x], dim=1)
        x.to(torch.bfloat16)
    recorder.write()
    recorded = json.loads((tmp_path / "calls.json").read_text())
    assert recorded and all(call["captured"] == 0 for call in recorded)
    for call in recorded:
        made = case(call["key"], call["args"], torch.mul, **call["kwargs"])
        made.run(made.build(0))
    (masked,) = (call for call in recorded if call["key"] == "masked_fill.Scalar")
    assert masked["args"][2] == {"float": "-inf"}
    assert aten.describe(masked["args"], {}) == "8x4 fp32 strided on the host, 8x4 bool strided on the host, -inf"


def test_right_results_pass_and_are_timed() -> None:
    added = case("add.Tensor", [tensor(4, 8, dtype="bfloat16"), 2.0], lambda a, b, alpha=1: torch.sub(a, b, alpha=-alpha))
    with torch.inference_mode():
        assert check(added, CPU)["right"] is True
        timing = time(added, CPU, graphs=False, rounds=2)
    assert timing["us"] and timing["ratio"] and timing["error"] is None


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


def test_what_cannot_be_made_again_says_so() -> None:
    with pytest.raises(NotMeasurable, match="self was a Sparse"):
        case("add.Tensor", [{"other": "Sparse"}, 1], torch.mul).build(0)


def test_a_recording_keeps_the_most_telling_calls() -> None:
    calls = [{"key": "neg", "args": [tensor(n, 4)], "kwargs": {}, "eager": 1, "captured": n} for n in range(1, 10)]
    calls.append({"key": "neg", "args": [tensor(3)], "kwargs": {}, "eager": 1, "captured": 0})
    rows = aten.condense(calls, 3)
    assert [row["args"][0]["shape"] for row in rows] == [[9, 4], [3], [1, 4]]
    assert {(row["seen_eager"], row["seen_captured"]) for row in rows} == {(10, 45)}


def test_recordings_of_several_models_are_added_up() -> None:
    one = aten.condense([{"key": "neg", "args": [tensor(2, 4)], "kwargs": {}, "eager": 1, "captured": 2}], 9)
    two = aten.condense([{"key": "neg", "args": [tensor(n, 4)], "kwargs": {}, "eager": 1, "captured": 2} for n in (2, 3)], 9)
    rows = aten.merged([one, two, one])
    assert [row["args"][0]["shape"] for row in rows] == [[3, 4], [2, 4]]
    assert {(row["seen_eager"], row["seen_captured"]) for row in rows} == {(4, 8)}


CHILD = """
import json, os, sys, time
replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
print(json.dumps({"ready": True}), file=replies)
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"function": None if request["key"] == "sparse" else request["key"] + "_fn"}), file=replies)
    if request["key"] == "crash":
        print("an illegal memory access", file=sys.stderr)
        os._exit(7)
    if request["key"] == "hang":
        time.sleep(60)
    if request["key"] != "sparse":
        found = {"right": True, "graph_safe": True} if request["do"] == "check" else {"ratio": [0.9, 0.8, 1.0]}
        print(json.dumps(found | {"lost": request["key"] == "lost"}), file=replies)
"""


def test_a_case_that_ends_its_process_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aten_cases.py").write_text(CHILD)
    monkeypatch.setattr(aten, "_HERE", tmp_path)
    keys = ("neg", "crash", "lost", "hang", "sparse", "abs")
    rows = [{"key": key, "args": [], "kwargs": {}, "seen_eager": 1, "seen_captured": 2} for key in keys]
    measurement = aten.Measurement(rows, tmp_path / "out.child", 3.0, aten.time.monotonic() + 60, 3, lambda: None)
    measurement.stage(("check", "time"), rows, 2, lambda row: None)
    found = {row["key"]: row for row in aten.public(rows)}
    assert set(found) == {"neg", "crash", "lost", "hang", "abs"}
    assert found["crash"]["error"] == "it ended its process (exit code 7): an illegal memory access"
    assert found["hang"]["error"] == "it took too long" and found["hang"]["function"] == "hang_fn"
    assert all(found[key]["ratio"] == [0.9, 0.8, 1.0] and "error" not in found[key] for key in ("neg", "lost", "abs"))
    assert aten.keys_without_rows(rows) == {"without_function": ["sparse"], "not_measured": {}}
    assert "crash_fn" in [cell for column in aten.table(aten.public(rows)).columns for cell in column._cells]


def test_what_there_was_no_time_for_is_told(tmp_path: Path) -> None:
    rows = [{"key": "neg", "args": [], "kwargs": {}}]
    measurement = aten.Measurement(rows, tmp_path / "out.child", 3.0, aten.time.monotonic() - 1, 3, lambda: None)
    measurement.stage(("check",), rows, 1, lambda row: None)
    assert aten.public(rows) == []
    assert aten.keys_without_rows(rows)["not_measured"] == {"neg": "it was not measured: the time was used up"}


def test_where_nothing_can_measure_every_operator_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aten_cases.py").write_text("raise SystemExit('no device')")
    monkeypatch.setattr(aten, "_HERE", tmp_path)
    rows = [{"key": key, "args": [], "kwargs": {}} for key in ("neg", "abs")]
    measurement = aten.Measurement(rows, tmp_path / "out.child", 3.0, aten.time.monotonic() + 60, 3, lambda: None)
    measurement.stage(("check",), rows, 2, lambda row: None)
    told = "no process could be started that measures: it ended its process (exit code 1): no device"
    assert aten.keys_without_rows(rows)["not_measured"] == {"neg": told, "abs": told}


def test_operators_that_pytorch_takes_apart_early_are_recorded_whole(tmp_path: Path) -> None:
    """FlagGems has a ``pad``, and PyTorch calls it instead of taking ``pad`` apart into ``constant_pad_nd``."""
    code = (
        "import sys, json, pathlib, torch; import record_aten; "
        "recorder = record_aten.Recorder(pathlib.Path(sys.argv[1]), 'cpu'); recorder.start()\n"
        "with torch.no_grad(): print(torch.nn.functional.pad(torch.ones(2), (1, 0)).tolist())\n"
        "recorder.write(); print([call['key'] for call in json.load(open(sys.argv[1]))])"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCHMARKS), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, "-c", code, str(tmp_path / "calls.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout.splitlines()
    assert printed[0] == "[0.0, 1.0, 1.0]" and "'pad'" in printed[1] and "'constant_pad_nd'" in printed[1]


def test_the_arguments_of_a_call_are_kept_as_they_are(tmp_path: Path) -> None:
    row = {"key": "clamp_", "args": [{"shape": [2]}, -3.4028234663852886e38], "us": 1.23456}
    result_file.write(tmp_path / "calls.json", {}, [row])
    (found,) = result_file.read(tmp_path / "calls.json")["rows"]
    assert found["args"] == row["args"] and found["us"] == 1.235
