# SPDX-License-Identifier: Apache-2.0
"""What benchmarks read from a profiler's trace."""

import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from serving_lib import kernels, python_calls
from serving_lib.table import step_table


class TestKernels:
    @staticmethod
    def trace(path: Path, *events: tuple[str, str, float] | tuple[str, str, float, float]) -> Path:
        """Events of category, name, duration and start; without a start an event begins where the one before it ends."""
        listed: list[dict[str, Any]] = []
        end = 1000.0
        for cat, name, dur, *start in events:
            ts = start[0] if start else end
            listed.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur})
            end = ts + dur
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [*listed, {"ph": "M", "name": "process_name"}]}, file)
        return path

    @pytest.mark.parametrize(
        ("name", "stripped"),
        [
            ("fused_0123abcd4567ef89_kernel", "fused_#_kernel"),
            ("kernel_at_0x7f3a12", "kernel_at_#"),
            ("void gemm<128, 4096, (bool)1>(float*)", "void gemm<128, 4096, (bool)1>(float*)"),
            ("triton_poi_fused_add_20251122", "triton_poi_fused_add_20251122"),
            ("_ZN7deadbeefE_feedbeef", "_ZN7deadbeefE_feedbeef"),
            ("sm90_f16f16_bf16_2x1x1", "sm90_f16f16_bf16_2x1x1"),
        ],
    )
    def test_only_hashes_and_addresses_are_stripped(self, name: str, stripped: str) -> None:
        assert kernels.strip(name) == stripped

    def test_a_window_counts_what_ran_on_the_device(self, tmp_path: Path) -> None:
        events = [
            ("kernel", "a", 3.0),
            ("kernel", "a", 5.0),
            ("kernel", "b", 1.0),
            ("gpu_memcpy", "c", 1.0),
            ("cuda_runtime", "launch", 9.0),
        ]
        found = kernels.read_window(self.trace(tmp_path / "t.gz", *events, ("cpu_op", "aten::add", 1.0))).per_step(2)
        assert found["kernels"] == {"a": 1.0, "b": 0.5} and found["copies"] == {"c": 0.5} and found["kind"] == "kernels"
        assert found["microseconds_per_step"] == found["busy_microseconds_per_step"] == 4.5
        assert found["top"][0] == {"name": "a", "count_per_step": 1.0, "microseconds_per_step": 4.0}
        assert found["host_microseconds_per_step"] == {"launch": 4.5}

    def test_the_steps_are_what_the_longer_window_has_more(self, tmp_path: Path) -> None:
        prefill = [("kernel", "p", 9.0), ("gpu_memcpy", "c", 1.0), ("cuda_driver", "wait", 7.0)]
        step = [("kernel", "s", 2.0), ("cuda_runtime", "launch", 1.5), ("kernel", "s", 2.0)]
        short, long = (kernels.read_window(self.trace(tmp_path / "t.gz", *prefill, *steps)) for steps in (step * 2, step * 6))
        found = (long - short).per_step(4)
        assert found["kernels"] == {"s": 2.0} and found["copies"] == {} and found["microseconds_per_step"] == 4.0
        assert found["busy_microseconds_per_step"] == 4.0 and found["host_microseconds_per_step"] == {"launch": 1.5}

    @pytest.mark.parametrize(
        ("intervals", "microseconds"),
        [
            ([], 0.0),
            ([(0.0, 9.0), (5.0, 54.0)], 59.0),
            ([(0.0, 9.0), (2.0, 3.0), (4.0, 1.0), (8.0, 2.0)], 10.0),
            ([(0.0, 9.0), (9.0, 1.0)], 10.0),
            ([(0.0, 9.0), (12.0, 1.0)], 10.0),
            ([(3.0, 2.0), (3.0, 4.0), (3.0, 2.0)], 4.0),
            ([(3.0, 0.0), (1.0, 1.0)], 1.0),
        ],
        ids=["none", "overlapping", "nested", "touching", "apart", "together", "of no length"],
    )
    def test_the_time_in_which_at_least_one_kernel_ran(self, intervals: list[tuple[float, float]], microseconds: float) -> None:
        for ordered in itertools.permutations(intervals):
            assert kernels.union(ordered) == microseconds

    def test_a_kernel_that_waits_for_the_one_before_it_does_not_count_twice(self, tmp_path: Path) -> None:
        """It waits while a matrix product runs. A copy beside and after them does not count."""
        step = [("kernel", "act", 54.0, 5.0), ("kernel", "mm", 50.0, 0.0), ("gpu_memcpy", "c", 9.0, 55.0), ("cpu_op", "x", 90.0, 0.0)]
        steps = [(cat, name, dur, 1e9 + 100 * number + ts) for number in range(6) for cat, name, dur, ts in step]
        short, long = (kernels.read_window(self.trace(tmp_path / "t.gz", *steps[: len(step) * count])) for count in (2, 6))
        found = (long - short).per_step(4)
        assert found["busy_microseconds_per_step"] == 59.0 and found["microseconds_per_step"] == 104.0
        assert [kernel["name"] for kernel in found["top"]] == ["act", "mm"]

    def test_on_a_cpu_operators_count(self, tmp_path: Path) -> None:
        """They nest: an operator's time has that of those that it calls."""
        found = kernels.read_window(self.trace(tmp_path / "t.gz", ("cpu_op", "aten::mul", 2.0, 4.0), ("cpu_op", "aten::add", 9.0, 1.0)))
        assert found.kernels == {"aten::add": 1, "aten::mul": 1} and found.kind == "operators"
        assert found.busy_microseconds == 9.0 and found.microseconds == {"aten::add": 9.0, "aten::mul": 2.0}

    def test_an_empty_window_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nothing"):
            kernels.read_window(self.trace(tmp_path / "t.gz"))

    def test_comparison(self) -> None:
        ours, theirs = {"kernels": {"a": 1.0, "b": 2.0}, "copies": {}}, {"kernels": {"a": 1.0, "b": 3.0, "c": 1.0}, "copies": {"d": 1.0}}
        assert kernels.compare(ours, ours) == {"identical": True, "differing": {}, "differing_copies": {}}
        found = kernels.compare(ours, theirs)
        assert found == {"identical": False, "differing": {"b": [2.0, 3.0], "c": [0.0, 1.0]}, "differing_copies": {"d": [0.0, 1.0]}}


class TestStepTable:
    """The times of two engines: sums of 100 and 104 µs, unions of 80 and 60."""

    @staticmethod
    def told(*unions: float | None) -> str:
        windows = {}
        for name, total, busy in zip(("native", "flagos"), (100.0, 104.0), unions, strict=True):
            window = {"kind": "kernels", "microseconds_per_step": total}
            windows[name] = {"decode/1": window if busy is None else {**window, "busy_microseconds_per_step": busy}}
        table = step_table({"baseline": "native", "profile": {"windows": windows}})
        assert table is not None
        output = io.StringIO()
        Console(file=output, width=200).print(table)
        return f"{table.title}\n{output.getvalue()}"

    def test_it_shows_the_time_in_which_a_kernel_ran(self) -> None:
        told = self.told(80.0, 60.0)
        assert "at least one kernel runs" in told and "80 µs  1.000" in told and "60 µs  0.750" in told

    @pytest.mark.parametrize("unions", [(None, None), (80.0, None), (None, 60.0)])
    def test_a_record_without_it_shows_the_sums(self, unions: tuple[float | None, float | None]) -> None:
        told = self.told(*unions)
        assert "sum of its kernels' durations" in told and "100 µs  1.000" in told and "104 µs  1.040" in told


class TestPythonCalls:
    """Traces of a scheduler that calls ``run_batch`` each 100 microseconds, for 60."""

    STEP = "sglang/srt/managers/scheduler.py(4613): run_batch"

    def trace(self, path: Path, steps: list[list[str]], between: str = "poll") -> Path:
        listed = [{"ph": "X", "cat": "python_function", "name": between, "ts": 1.0, "dur": 1.0}]
        for number, called in enumerate(steps):
            begin = 100.0 * (number + 1)
            calls = [(self.STEP, begin, 60.0), *((name, begin + 1 + i, 1.0) for i, name in enumerate(called)), (between, begin + 80, 1.0)]
            listed += [{"ph": "X", "cat": "python_function", "name": name, "ts": ts, "dur": dur} for name, ts, dur in calls]
            listed.append({"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": begin + 2, "dur": 1.0})
        # Traces are not in order.
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *reversed(listed)]}, file)
        return path

    def test_a_decode_step_reaches_to_the_next_and_leaves_out_what_is_rare(self, tmp_path: Path) -> None:
        first, usual, logging, last = ["prefill"] * 9, ["f", "g", "f"], ["f", "g", "f", "log"], ["f", "end"]
        steps = [first, *[usual] * 5, logging, *[usual] * 4, last]
        assert python_calls.decode_step(self.trace(tmp_path / "t.gz", steps)) == {self.STEP: 1, "f": 2, "g": 1, "poll": 1}

    def test_so_many_tokens_make_enough_steps(self, tmp_path: Path) -> None:
        """The prefill makes one, and so does each decode step."""
        steps = [["prefill"], *[["f"]] * (python_calls.DECODE_TOKENS - 1)]
        assert python_calls.decode_step(self.trace(tmp_path / "t.gz", steps))["f"] == 1
        with pytest.raises(ValueError, match="4 whole steps"):
            python_calls.decode_step(self.trace(tmp_path / "t.gz", steps[:-1]))

    def test_a_prefill_ends_where_the_engine_may_be_idle(self, tmp_path: Path) -> None:
        assert python_calls.prefill_step(self.trace(tmp_path / "t.gz", [["f"]] * 5)) == {self.STEP: 1, "f": 1}

    def test_addresses_and_the_checkouts_place_are_stripped(self, tmp_path: Path) -> None:
        called = ["<built-in method cat of type object at 0x7f24add53c60>", "/home/x/sglang_fl/bind.py(3): f", "sglang_fl/bind.py(3): f"]
        found = python_calls.prefill_step(self.trace(tmp_path / "t.gz", [called] * 5))
        assert found == {self.STEP: 1, "<built-in method cat of type object at >": 1, "sglang_fl/bind.py(3): f": 2}

    def test_too_few_steps_are_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="4 whole steps of the scheduler, and 5"):
            python_calls.prefill_step(self.trace(tmp_path / "t.gz", [["f"]] * 4))
        with pytest.raises(ValueError, match="0 whole steps"):
            python_calls.decode_step(self.trace(tmp_path / "t.gz", [["f"]] * 3))

    def test_comparison(self) -> None:
        ours, theirs = {"f": 2, "g": 1}, {"f": 3, "h": 1}
        assert python_calls.compare(ours, ours) == {"identical": True, "calls_per_step": 3, "differing": {}}
        found = python_calls.compare(ours, theirs)
        assert found == {"identical": False, "calls_per_step": 4, "differing": {"f": [2, 3], "g": [1, 0], "h": [0, 1]}}
