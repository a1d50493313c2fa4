# SPDX-License-Identifier: Apache-2.0
"""What follows from measurements: statistics, the journal, groups that are served, the profile. Times are numbers here, no clock's."""

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_fl.aten.operators import unlisted
from sglang_fl.cli import main
from sglang_fl.config import SettingsError, load_settings
from sglang_fl.config.words import Words
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.fingerprint.measured import changes, measured_in, warn_of_changes
from sglang_fl.tune import profile, traffic
from sglang_fl.tune.baseline import Baseline, read_baseline
from sglang_fl.tune.bench import NATIVE, Bench, Choice, StartFailed
from sglang_fl.tune.budget import Budget, BudgetOver
from sglang_fl.tune.confirm import Confirmed, confirm
from sglang_fl.tune.engine import Engine, EngineFailed
from sglang_fl.tune.journal import Journal
from sglang_fl.tune.judge import CRASHED, SLOWER, SLOWER_SERVED, TIE, UNDECIDED, USED, WRONG, Candidate, judge_alone, timed
from sglang_fl.tune.layer_calls import calls_to_try
from sglang_fl.tune.live import if_memory_suffices
from sglang_fl.tune.outcome import Outcome
from sglang_fl.tune.page import as_html
from sglang_fl.tune.serve import Served, choice_of
from sglang_fl.tune.served import Lengths, cases
from sglang_fl.tune.statistics import LOOKS, Speed, is_decided, smallest_effect, speed
from sglang_fl.tune.tuning import Job, Tuning
from sglang_fl.utils.packages import source_hash

NOISE = {"prefill/1": 0.02, "decode/1": 0.02}


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of times with a heavy tail, as a busy machine has them: looked at three times, wrong in 5 % at most."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        one, two = (1 + rng.standard_t(2, LOOKS[-1]) * 0.02 for _ in range(2))
        found = [speed(one[:look].tolist(), two[:look].tolist()) for look in LOOKS]
        missed += any(not each.low <= 1 <= each.high for each in found)
    assert missed <= 2000 * 0.06


def test_few_pairs_say_nothing_and_times_that_are_none_are_left_out() -> None:
    assert speed([2.0] * 6, [1.0] * 6).low == 0.0
    assert speed([2.0] * 8 + [1.0], [1.0] * 8 + [-1.0]) == Speed(2.0, 2.0, 2.0, 8)


def test_what_is_smaller_than_the_machine_can_show_is_not_claimed() -> None:
    noise = smallest_effect(Speed(1.0, 0.95, 1.03, 18))
    assert noise == pytest.approx(1 / 0.95 - 1)
    assert not Speed(0.96, 0.94, 0.98, 18).is_slower(noise) and Speed(0.94, 0.93, 0.99, 18).is_slower(noise)
    assert smallest_effect(Speed(1.0, 1.0, 1.0, 18)) == 0.01


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Speed(1.1, 1.06, 1.2, 8), "1.100 [1.060, 1.200] of native's speed: faster"),
        (Speed(0.9, 0.8, 0.94, 8), "0.900 [0.800, 0.940] of native's speed: slower"),
        (Speed(1.1, 0.98, 1.2, 8), "1.100 [0.980, 1.200] of native's speed: no difference can be shown"),
        (Speed(1.03, 1.01, 1.05, 8), "1.030 [1.010, 1.050] of native's speed: below the smallest effect, 5.0 %"),
    ],
)
def test_a_speed_says_what_it_shows(found: Speed, words: str) -> None:
    assert found.in_words(0.05) == words


def test_more_pairs_are_taken_until_the_interval_decides() -> None:
    assert is_decided({"a": Speed(1.2, 1.1, 1.3, 8)}, {"a": 0.05}) and is_decided({"a": Speed(1.0, 0.98, 1.02, 8)}, {"a": 0.05})
    assert not is_decided({"a": Speed(1.03, 0.9, 1.2, 8)}, {"a": 0.05})


HEAD = {"model": "a"}


class TestJournal:
    def test_what_was_measured_is_not_measured_again(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        journal = Journal(path, HEAD, resume=False)
        assert journal.measured("pair", "x", lambda: 1) == 1
        with pytest.raises(SettingsError, match="in use by another run"):
            Journal(path, HEAD, resume=True)
        journal.close()
        with pytest.raises(SettingsError, match="--resume"):
            Journal(path, HEAD, resume=False)
        with pytest.raises(SettingsError, match="model was a and is b"):
            Journal(path, {"model": "b"}, resume=True)
        again = Journal(path, HEAD, resume=True)
        assert again.measured("pair", "x", lambda: 2) == 1 and again.measured("pair", "y", lambda: 2) == 2
        again.close()

    def test_a_run_that_is_killed_loses_one_measurement_at_most(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        process = multiprocessing.get_context("fork").Process(target=_killed_in_a_measurement, args=(path, HEAD))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        path.write_bytes(path.read_bytes() + b'{"kind": "pair", "key": "pair: c", "va')  # a line that was being written
        journal = Journal(path, HEAD, resume=True)
        assert [journal.measured("pair", name, lambda: "anew") for name in "abc"] == ["a", "b", "anew"]
        journal.close()
        assert [json.loads(line)["value"] for line in path.read_text().splitlines()[1:]] == ["a", "b", "anew"]

    def test_a_run_that_measured_nothing_leaves_nothing_to_continue(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        journal = Journal(path, HEAD, resume=False)
        with pytest.raises(ZeroDivisionError):
            journal.measured("about", "the engine", lambda: 1 // 0)
        journal.close()
        Journal(path, {"model": "b"}, resume=False).close()

    @pytest.mark.parametrize(("lines", "told"), [("{}\n", ":1: not a line of a journal"), ('{"for": {}}\n{\n', "cannot be read")])
    def test_a_broken_line_is_told(self, tmp_path: Path, lines: str, told: str) -> None:
        path = tmp_path / "journal.jsonl"
        path.write_text(lines)
        with pytest.raises(SettingsError, match=told):
            Journal(path, {}, resume=True)


def _killed_in_a_measurement(path: Path, head: Mapping[str, Any]) -> None:
    journal = Journal(path, head, resume=False)
    for name in "ab":
        journal.measured("pair", name, lambda name=name: name)
    journal.measured("pair", "c", lambda: os.kill(os.getpid(), signal.SIGKILL))


class TestTraffic:
    def test_a_users_requests_are_sent_as_they_are(self, tmp_path: Path) -> None:
        file = tmp_path / "requests.jsonl"
        page = (Path(__file__).parents[2] / "docs/tune.md").read_text(encoding="utf-8")
        lines = re.findall(r"^{.*}$", page.partition("## Traffic")[2], re.MULTILINE)
        file.write_text("\n\n".join(lines) + "\n")
        first, second = traffic.read(file, 100)
        assert len(first["input_ids"][0]) == 900 and first["sampling_params"]["max_new_tokens"] == 200
        sampling = {"ignore_eos": True, "max_new_tokens": 16, "temperature": 0.7}
        assert second == {"prompt": ["What is a monad?"], "sampling_params": sampling}

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("{", ":1: not valid JSON"),
            ('\n{"inputlen": 3}', ":2: expected no 'inputlen'; did you mean 'input_len'"),
            ("", "has no request"),
            ("5", ":1: expected an object"),
            *((f'{{"input_len": {bad}}}', ":1: input_len: expected a whole number") for bad in ("null", '"abc"', "NaN", "-1", "0", "true")),
            ('{"prompt": "a", "output_len": "x"}', ":1: output_len: expected a whole number from 1"),
            *((f'{{"prompt": "a", "sampling_params": {bad}}}', ":1: sampling_params: expected an object") for bad in ("null", "[]")),
            *(
                (f'{{"input_ids": {bad}}}', ":1: input_ids: expected a list of token ids below 100")
                for bad in ("[]", '"abc"', "[100]", "[-1]")
            ),
            *((f'{{"prompt": {bad}}}', ":1: prompt: expected a text") for bad in ("5", "null", '""')),
            ('{"prompt": "a", "input_len": 3}', ":1: expected one of prompt, input_ids, input_len, found prompt, input_len"),
            ('{"output_len": 3}', ":1: expected one of prompt"),
        ],
    )
    def test_what_is_no_request_is_named_with_its_line(self, tmp_path: Path, text: str, told: str) -> None:
        file = tmp_path / "requests.jsonl"
        file.write_text(text)
        with pytest.raises(SettingsError, match=told):
            traffic.read(file, 100)

    def test_a_prompt_may_have_line_breaks_of_unicode(self, tmp_path: Path) -> None:
        file = tmp_path / "requests.jsonl"
        file.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
        assert traffic.read(file, 100)[0]["prompt"] == ["a\u2028b"]

    def test_the_mix_fits_the_model(self) -> None:
        prompts = [prompt for batch in traffic.mix(50, 40, sampled=True) for prompt in batch["input_ids"]]
        assert max(map(len, prompts)) == 40 and max(map(max, prompts)) < 50


def row(ratio: float, spread: float = 0.01, per_pass: float = 10.0) -> Any:
    call = {"call": "1x64", "per_pass": {"decode/1": per_pass}}
    own = {"us": 100.0, "host_us": None, "error": None}
    return timed(call, own, {"us": 100 * ratio, "ratio": (ratio, ratio - spread, ratio + spread), "error": None}, in_graph=False)


class TestAlone:
    def judged(self, *rows: Any, outside: bool = False, impl: str | None = "vendor.a") -> Candidate:
        candidate = Candidate("silu_and_mul", impl, ["a"])
        judge_alone(candidate, rows, {"decode/1": 1e5}, outside)
        return candidate

    def test_what_is_faster_goes_on_with_what_it_saves(self) -> None:
        found = self.judged(row(0.5), row(0.7, per_pass=0))
        assert found.status == "not measured" and found.gains == {"decode/1": pytest.approx(500)}
        assert found.gain_bounds == {"decode/1": pytest.approx((490, 510))}

    def test_what_loses_in_a_step_is_none(self) -> None:
        """Faster in most calls. In the most frequent one it is slower by less than the noise."""
        found = self.judged(row(0.5, per_pass=0), row(0.5, per_pass=0), row(1.03, spread=0.05))
        assert found.status == TIE and "30 µs slower in a step of decode/1" in found.reason

    def test_slower_at_one_call_is_slower(self) -> None:
        found = self.judged(row(0.5), row(0.5), row(1.1))
        assert found.status == SLOWER and "1.1 times native's time (1x64)" in found.reason

    def test_a_call_of_which_nothing_is_known_hides_no_slow_one(self) -> None:
        found = self.judged(*[row(0.5)] * 6, row(1.5, spread=0.05), row(1.6, spread=0.8))
        assert found.status == SLOWER and "1.5 times native's time" in found.reason

    def test_a_function_that_costs_much_of_a_step_is_slower_where_it_serves(self) -> None:
        """So that ``prefer: flagos`` leaves it to PyTorch; an implementation has an order of its own."""
        found = self.judged(row(2.1), impl=None)
        assert found.status == SLOWER_SERVED and found.reason == "2.1 times native's time (1x64), which costs 1.1 % of a step of decode/1"
        assert self.judged(row(1.9), impl=None).status == SLOWER == self.judged(row(2.1)).status

    @pytest.mark.parametrize("rows", [[row(1.0)], [row(0.99)], [row(0.95, spread=0.2)]])
    def test_ties_stay_with_sglang(self, rows: list[Any]) -> None:
        assert self.judged(*rows).status == TIE

    def test_what_saves_next_to_nothing_of_a_step_is_a_tie(self) -> None:
        found = self.judged(row(0.5, per_pass=0.15))
        assert found.status == TIE and found.reason.endswith("but that saves only 0.0075 % of a step")

    def test_calls_outside_of_the_forward_count_where_it_is_in_force_there(self) -> None:
        sampling = row(0.5)
        sampling.call["per_pass"] = {"decode/1 outside": 10.0}
        assert self.judged(sampling, outside=True).gains == {"decode/1": pytest.approx(500)}
        assert self.judged(sampling).gains == {}

    def test_what_only_other_requests_call_is_judged_by_its_calls_alone(self) -> None:
        other = row(0.5)
        other.call["per_pass"] = {"decode/traffic": 1.0}
        assert self.judged(other, outside=True).status == "not measured"

    def test_what_no_graph_holds_is_judged_by_the_host(self) -> None:
        own, theirs = (
            {"us": 1.0, "host_us": 10.0, "error": None},
            {"us": 0.5, "ratio": (0.5, 0.5, 0.5), "host_ratio": (3.0, 3.0, 3.0), "error": None},
        )
        assert timed({}, own, theirs, in_graph=True).ratio[0] == 0.5  # type: ignore[union-attr]
        assert timed({}, own, theirs, in_graph=False).ratio[0] == 3.0  # type: ignore[union-attr]
        assert timed({}, own, {**theirs, "error": "no"}, in_graph=True) == (WRONG, "timing it failed: no")

    def test_what_the_machine_could_not_time_is_no_fault_of_the_candidate(self) -> None:
        fine: Any = {"us": 1.0, "ratio": (1.0, 1.0, 1.0), "error": None}
        failed = {"us": None, "ratio": None, "error": "OutOfMemoryError: CUDA out of memory"}
        for own, theirs in ((failed, fine), (failed, {**failed, "error": "no"}), (fine, failed)):
            assert timed({}, own, theirs, in_graph=True)[0] == UNDECIDED  # type: ignore[index]


def test_inputs_that_do_not_fit_leave_the_engine_as_it_is() -> None:
    def times() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB")

    assert "lower --mem-fraction-static" in if_memory_suffices(times)["error"]
    assert if_memory_suffices(lambda: {"own": torch.is_inference_mode_enabled()}) == {"own": True}


class PlantedBench:
    """An engine whose times are what its choice makes them: each candidate saves, or costs, its part of a step.

    Args:
        saves: candidate -> part of a step.
        ends_with: the engine ends when it goes by one of these.
        refuses: those that cannot be put in force.
    """

    def __init__(self, saves: Mapping[str, float], ends_with: frozenset[str] = frozenset(), refuses: frozenset[str] = frozenset()):
        self.cases = cases([1])
        self._saves, self._ends_with, self._refuses = saves, ends_with, refuses
        self._ends_together: set[str] | None = None
        self._rng, self._in_force = np.random.default_rng(0), NATIVE
        self.used: list[Choice] = []

    def use(self, choice: Choice) -> dict[str, str]:
        names = {*dict(choice.impls), *choice.functions}
        if names & self._ends_with or names == self._ends_together:
            raise EngineFailed("engine: it ended")
        self._in_force = choice
        self.used.append(choice)
        return dict.fromkeys(names & self._refuses, "failed its trial")

    def round(self, number: int) -> dict[str, float]:
        names = [*dict(self._in_force.impls), *self._in_force.functions]
        seconds = 1.0 - sum(self._saves[name] for name in names)
        return {str(case): seconds * (1 + 0.002 * self._rng.standard_normal()) for case in self.cases}


def settle(tmp_path: Path, bench: PlantedBench, promised: Mapping[str, float]) -> tuple[dict[str, Candidate], list[str]]:
    """What becomes of candidates that promise, by themselves, to save so much of a step."""
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    served = Served(bench, NOISE, dict.fromkeys(NOISE, 1e6), journal.measured)  # type: ignore[arg-type]
    found = {name: Candidate(name, "vendor.a", ["a"], gains=dict.fromkeys(NOISE, 1e6 * part)) for name, part in promised.items()}
    used = served.settle(list(found.values()))
    journal.close()
    return found, [candidate.name for candidate in used]


class TestServed:
    def test_a_group_that_keeps_its_promise_is_measured_once(self, tmp_path: Path) -> None:
        bench = PlantedBench({"a": 0.1, "b": 0.1})
        found, used = settle(tmp_path, bench, {"a": 0.1, "b": 0.1})
        assert used == ["a", "b"] and {*bench.used} == {NATIVE, choice_of(list(found.values()))}
        assert all(
            candidate.status == USED and candidate.served["decode/1"][0] == pytest.approx(1.25, rel=0.01) for candidate in found.values()
        )

    def test_the_one_that_is_slower_served_is_found(self, tmp_path: Path) -> None:
        saves = {"a": 0.1, "b": -0.2, "c": 0.1, "d": 0.05}
        found, used = settle(tmp_path, PlantedBench(saves), {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.05})
        assert used == ["a", "c", "d"] and found["b"].status == SLOWER_SERVED and "of native's speed in" in found["b"].reason

    def test_one_that_takes_back_what_others_gain_is_found(self, tmp_path: Path) -> None:
        """The group as a whole is faster, but much less than its members promise."""
        found, used = settle(tmp_path, PlantedBench({"a": 0.3, "b": -0.15}), {"a": 0.3, "b": 0.2})
        assert used == ["a"] and found["b"].status == SLOWER_SERVED

    def test_one_that_ends_the_engine_or_cannot_be_put_in_force_costs_itself(self, tmp_path: Path) -> None:
        bench = PlantedBench({"a": 0.1, "b": 0.1, "c": 0.1}, frozenset("b"), frozenset("c"))
        found, used = settle(tmp_path, bench, {"a": 0.1, "b": 0.1, "c": 0.1})
        assert used == ["a"] and found["b"].status == CRASHED
        assert found["c"].status == WRONG and "failed its trial" in found["c"].reason

    def test_two_that_end_the_engine_only_together_cost_the_smaller_gain(self, tmp_path: Path) -> None:
        bench = PlantedBench({"a": 0.1, "b": 0.2})
        bench._ends_together = {"a", "b"}
        found, used = settle(tmp_path, bench, {"a": 0.1, "b": 0.2})
        assert used == ["b"] and found["a"].status == CRASHED and "together with others" in found["a"].reason


def test_a_model_with_a_draft_model_is_started_again_for_each_choice(tmp_path: Path) -> None:
    started: list[Mapping[str, str]] = []

    class Starting(Bench):
        is_up = True

        def start(self, environ: Mapping[str, str] | None = None) -> None:
            started.append(environ or {})

        def ask(self, do: str, **values: Any) -> Any:
            assert do == "in_force"
            return {"bound": {"silu_and_mul": ["(vendor.a)"]}, "functions": []}

    bench = Starting([], tmp_path, Lengths(8, 8, 8), [1])
    bench.know({"draft": True})
    choice = Choice.of({"silu_and_mul": "vendor.a", "rms_norm": "vendor.b"}, ["mul"])
    missing = bench.use(choice)
    assert bench.use(choice) == bench.use(NATIVE) == {}, "it is started once for each"
    assert missing == {"rms_norm": "nothing in the model runs on it", "flag_gems.mul": "it is left to PyTorch"}
    assert [environ["SGLANG_FL_PLUGIN_MODULES"] for environ in started] == ["sglang_fl.tune.live"] * 2
    assert "rms_norm=impl:vendor.b|sglang" in started[0]["SGLANG_FL_PER_OP"] and started[0]["SGLANG_FL_FLAGOS_WHITELIST"] == "mul"
    assert "rms_norm=sglang" in started[1]["SGLANG_FL_PER_OP"] and started[1]["USE_FLAGGEMS"] == "0"


def test_a_second_interrupt_leaves_no_engine_behind(tmp_path: Path) -> None:
    ended = []

    class Interrupted:
        def kill(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt, match="the first"), Bench([], tmp_path, Lengths(8, 8, 8), [1]) as bench:
        bench._engine = Interrupted()  # type: ignore[assignment]
        raise KeyboardInterrupt("the first")
    assert ended == [True]


def test_a_native_start_that_fails_is_told_from_a_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(engine: Engine) -> None:
        raise EngineFailed("engine: it ended during the start")

    monkeypatch.setattr(Engine, "start", failing)
    bench = Bench([], tmp_path, Lengths(8, 8, 8), [1])
    with pytest.raises(StartFailed, match="it ended"):
        bench.use(NATIVE)
    bench.know({"draft": True})
    with pytest.raises(EngineFailed, match="it ended"):
        bench.start(Choice.of({"rms_norm": "vendor.a"}, []).environ())


def test_engines_have_the_users_files_and_the_profile_overrides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Mapping[str, str]] = []
    monkeypatch.setattr(Engine, "start", lambda engine: started.append(engine._environ))
    monkeypatch.setattr(Engine, "wait_until_ready", lambda engine, deadline: None)
    monkeypatch.setattr(Engine, "kill", lambda engine: None)
    monkeypatch.setenv("SGLANG_FL_CONFIG", "mine.yaml,/old/p.yaml")
    monkeypatch.setenv("SGLANG_FL_PREFER", "vendor")
    bench = Bench([], tmp_path, Lengths(8, 8, 8), [1])
    bench.know({"plain_cpu": True})
    for environ in (None, bench.environ_of(None), bench.environ_of(Path("/old/p.yaml")), bench.environ_of(Path("new.yaml"))):
        bench.start(environ)
    files = [environ["SGLANG_FL_CONFIG"] for environ in started]
    assert files == ["mine.yaml,/old/p.yaml"] * 3 + ["mine.yaml,/old/p.yaml,new.yaml"]
    assert not any("SGLANG_FL_PREFER" in environ for environ in started)


def outcome(**more: Any) -> Outcome:
    used = Candidate("silu_and_mul", "vendor.a", ["json"], status=USED, reason="0.5 times", ratio=(0.4, 0.5, 0.6))
    used.own_us, used.gains, used.gain_bounds = {"decode/1": 24.0}, {"decode/1": 12.0}, {"decode/1": (11.0, 13.0)}
    wrong = Candidate("silu", None, ["email"], status=WRONG, reason="it is off by 1")
    conditions = {
        "chip": "cpu",
        "driver": "none",
        "versions": {"torch": "1", "triton": "1", "sglang": "1"},
        "model": "M hidden_size=8",
        "tp": 1,
    }
    about = {"conditions": conditions, "implementations": {"silu_and_mul": [], "rms_norm": []}, "scope": "everywhere", "plain_cpu": True}
    given: dict[str, Any] = {
        "noise": {"decode/1": 0.02},
        "step_us": {"decode/1": 100.0},
        "candidates": [used, wrong],
        "not_exercised": ["rms_norm"],
        "used": Choice.of({"silu_and_mul": "vendor.a"}, []),
        "served": {"decode/1": Speed(1.2, 1.1, 1.3, 8)},
        "confirmed": Confirmed({"decode/1": 1.19}, {"decode/1": 0.03}, {"decode/1": 0.02}),
    }
    return Outcome(about=about, **(given | more))


class TestProfile:
    def test_it_is_a_users_file_with_the_figures_as_data(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.yaml"
        slower = Candidate("mm", None, ["email"], status=SLOWER_SERVED, reason="0.9 of native's speed")
        profile.write(path, outcome(candidates=[*outcome().candidates, slower]), Baseline())
        settings = load_settings({"SGLANG_FL_CONFIG": str(path)})
        orders = dict(settings.op_backends)
        assert orders.pop("silu_and_mul") == ("impl:vendor.a", "sglang")
        assert orders.keys() == set(OPERATORS) - {"silu_and_mul"} and {*orders.values()} == {("sglang",)}
        assert settings.flagos_functions == () and settings.flagos_broken == ("silu",) and settings.flagos_slower == ("mm",)
        entry = (measured_in(path) or {})["entries"]["silu_and_mul"]
        assert entry["impl"] == "vendor.a" and entry["candidates"]["vendor.a"]["reason"] == "0.5 times"
        assert (measured_in(path) or {})["us_of_a_step"] == {"decode/1": 100.0}
        assert (measured_in(path) or {})["starts_differ_by"] == {"native": {"decode/1": 0.03}, "tuned": {"decode/1": 0.02}}
        assert read_baseline(path, "--update").choice == Choice.of({"silu_and_mul": "vendor.a"}, [])

    def test_an_operator_and_a_function_of_the_same_name_have_an_entry_each(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.yaml"
        both = [Candidate("topk", "vendor.a", ["json"], status=USED), Candidate("topk", None, ["flag_gems"], status=WRONG, reason="off")]
        profile.write(path, outcome(candidates=both, used=choice_of(both[:1])), Baseline())
        entries = (measured_in(path) or {})["entries"]
        assert entries["topk"]["impl"] == "vendor.a" and entries["flag_gems.topk"]["reason"] == "off"
        settings = load_settings({"SGLANG_FL_CONFIG": str(path)})
        assert settings.flagos_broken == ("topk",) and dict(settings.op_backends)["topk"] == ("impl:vendor.a", "sglang")

    def test_keys_of_profiles_need_what_was_measured(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("flagos_faster: [add]\n")
        with pytest.raises(SettingsError, match="is a key of profiles"):
            load_settings({"SGLANG_FL_CONFIG": str(path)})
        path.write_text("measured: yes\n")
        with pytest.raises(SettingsError, match=r"mine.yaml:1: measured: expected a mapping"):
            load_settings({"SGLANG_FL_CONFIG": str(path)})
        with pytest.raises(SettingsError, match="was not written by sglang-fl tune"):
            read_baseline(path, "--update")

    @pytest.mark.parametrize("key", ["with", "entries"])
    def test_what_a_server_compares_must_be_a_mapping(self, tmp_path: Path, key: str) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(f"measured:\n  {key}: 7\n")
        with pytest.raises(SettingsError, match=f"mine.yaml:2: measured: {key}: expected a mapping"):
            load_settings({"SGLANG_FL_CONFIG": str(path)})

    def test_names_that_are_no_more_are_left_to_sglang_with_one_warning(self, tmp_path: Path, caplog: Any) -> None:
        path = tmp_path / "profile.yaml"
        orders = "op_backends:\n  rms_norm: ['impl:vendor.gone', sglang]\n  silu_and_mul: ['impl:vendor.here', sglang]\n  lost: [sglang]\n"
        path.write_text(f"{orders}flagos_faster: [mul, gone]\nmeasured: {{entries: {{}}}}\n")
        words = Words(frozenset({"rms_norm", "silu_and_mul"}), impls=frozenset({"vendor.here"}), flaggems=frozenset({"mul"}))
        for _ in range(2):
            settings = load_settings({"SGLANG_FL_CONFIG": str(path)}, words=words)
        orders_of = dict(settings.op_backends)
        assert (
            orders_of["rms_norm"] == ("sglang",) and orders_of["silu_and_mul"] == ("impl:vendor.here", "sglang") and "lost" not in orders_of
        )
        assert settings.flagos_faster == ("mul",) and len(caplog.records) == 1
        assert "profile.yaml:2: op_backends: rms_norm: unknown implementation 'vendor.gone'" in caplog.text
        assert f"--update {path}" in caplog.text
        path.write_text(orders)
        with pytest.raises(SettingsError, match="unknown implementation"):
            load_settings({"SGLANG_FL_CONFIG": str(path)}, words=words)

    def test_other_versions_are_named_with_the_entries_that_they_touch(self, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
        path = tmp_path / "profile.yaml"
        profile.write(path, outcome(), Baseline())
        measured = dict(measured_in(path) or {})
        now = outcome().about["conditions"]
        assert changes(measured, now) == []
        (found,) = changes(measured, {**now, "chip": "H100"})
        assert str(found) == "chip was cpu and is H100: silu_and_mul, flag_gems.silu"
        measured["with"]["sources"]["json"] = "before"
        (found,) = changes(measured, now)
        assert found.entries == ("silu_and_mul",) and found.now == source_hash("json")
        monkeypatch.setenv("SGLANG_FL_CONFIG", str(path))
        warn_of_changes(load_settings(), lambda: {**now, "tp": 2})
        assert len(caplog.records) == 1 and "tp was 1 and is 2: silu_and_mul, flag_gems.silu" in caplog.text
        assert f"sglang-fl tune --update {path} MODEL" in caplog.text
        caplog.clear()
        path.write_text(path.read_text().replace("measured:\n", "measured:\n  models: {a: {}}\n"))
        warn_of_changes(load_settings(), lambda: {**now, "tp": 2})
        assert "tune its models again, and sglang-fl tune --merge" in caplog.text

    def test_a_platforms_profile_that_uses_nothing_costs_a_server_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.yaml"
        left = Candidate("silu_and_mul", "vendor.a", ["json"], status=SLOWER)
        profile.write(path, outcome(candidates=[left], used=NATIVE), Baseline())
        asked: list[str] = []
        warn_of_changes(replace(load_settings(), profile_file=str(path)), lambda: {"asked": asked.append("conditions")})
        assert not asked

    def test_what_has_no_decision_yet_is_measured_by_an_update(self) -> None:
        about = {"implementations": {"topk": [{"impl": "vendor.a", "packages": ["json"], "why_not": None}], "rms_norm": []}}

        def of(**verdict: str) -> Baseline:
            entries = {"topk": {"impl": "sglang", "candidates": {"vendor.a": verdict}}, "flag_gems.mul": {"status": "used"}}
            return Baseline(measured={"entries": entries})

        assert of(status="slower").not_measured(about) == []
        assert of(status="not available").not_measured(about) == of(status="undecided").not_measured(about) == ["topk"]
        undecided = Baseline(measured={"entries": {"flag_gems.mul": {"status": "undecided"}}})
        assert undecided.not_measured({"implementations": {}}) == ["flag_gems.mul"]
        used = Choice.of({}, ["mul"])
        assert Baseline().is_confirmed and not Baseline(used).is_confirmed and Baseline(used, {"confirmed": {}}).is_confirmed

    def test_a_library_that_was_not_there_touches_functions_without_an_entry(self) -> None:
        then, now = ({"versions": versions} for versions in ({"torch": "1"}, {"torch": "1", "flag_gems": "5"}))
        (found,) = Baseline(measured={"with": then, "entries": {}}).changes({"conditions": {**now, "model": "M"}})
        assert str(found) == "flag_gems was not installed and is 5"

    def test_entries_that_were_not_measured_again_are_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.yaml"
        earlier = {"entries": {"topk": {"impl": "sglang", "packages": ["json"], "candidates": {}}}}
        profile.write(path, outcome(left=frozenset({"topk"})), Baseline(measured=earlier))
        assert set((measured_in(path) or {})["entries"]) == {"topk", "silu_and_mul", "flag_gems.silu"}

    def test_the_page_shows_what_is_used_and_why_the_rest_is_not(self) -> None:
        page = as_html(outcome())
        assert "Replacements used: 1" in page and "it is off by 1" in page and "<svg" in page
        assert "vendor.a 12.0 %, saved 12.0 %, SGLang&#39;s own 76.0 %" in page and "decode/1 12.0 [11.0, 13.0]" in page
        assert "http" not in page.replace("http-equiv", "")
        native = as_html(outcome(used=NATIVE, why_native="on fresh starts it had 0.9 of native's speed", served={}, confirmed=None))
        assert "SGLang's own everywhere" in native.replace("&#39;", "'") and "on fresh starts" in native


@pytest.mark.parametrize(("saves", "speed_of_tuned", "slower"), [(0.2, 1.25, False), (-0.25, 0.8, True)])
def test_fresh_starts_are_native_tuned_tuned_native(tmp_path: Path, saves: float, speed_of_tuned: float, slower: bool) -> None:
    started = []

    class Starting(PlantedBench):
        def environ_of(self, path: Path | None) -> dict[str, str]:
            return {"SGLANG_FL_CONFIG": str(path or "")}

        def start(self, environ: Mapping[str, str]) -> None:
            started.append(bool(environ["SGLANG_FL_CONFIG"]))
            self._in_force = Choice.of({"a": "vendor.a"} if started[-1] else {}, [])

        def stop(self) -> None:
            pass

    path = tmp_path / "profile.yaml"
    path.write_text("{}")
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    for _ in range(2):  # the second time all is in the journal
        found = confirm(Starting({"a": saves}), journal.measured, path, "a=vendor.a", NOISE)  # type: ignore[arg-type]
    journal.close()
    assert started == [False, True, True, False]
    assert found.speeds["decode/1"] == pytest.approx(speed_of_tuned, rel=0.02) and bool(found.slower()) is slower


def test_one_disturbed_start_calls_nothing_slower(tmp_path: Path) -> None:
    """Of the two tuned starts one was slower than native, and the other was not: SGLang's own everywhere, and no candidate is accused."""
    seconds = dict.fromkeys(("0 native ", "1 tuned a", "2 tuned a", "3 native "), 1.0)
    bench: Any = PlantedBench({})
    bench.environ_of = lambda path: {}

    def found_with(**tuned: float) -> Confirmed:
        def measured(kind: str, name: str, measure: Any) -> dict[str, list[float]]:
            return {"decode/1": [(seconds | tuned)[name] * (1 + 0.001 * index) for index in range(8)]}

        found = confirm(bench, measured, tmp_path, "a", NOISE)
        assert isinstance(found, Confirmed)
        return found

    disturbed = found_with(**{"1 tuned a": 1.4})
    assert disturbed.speeds["decode/1"] == pytest.approx(1 / 1.2)
    status, why = disturbed.verdict()
    assert status == UNDECIDED and "had 0.833 of native's speed in decode/1, but its own two starts differ by more" in why
    words = "0.833 of native's speed: slower (two starts differ by up to 2.0 %, with the profile by up to 40.0 %)"
    assert disturbed.in_words("decode/1") == words
    assert "with the profile more than twofold" in found_with(**{"1 tuned a": 3.0}).in_words("decode/1")
    slower = found_with(**{"1 tuned a": 1.4, "2 tuned a": 1.4})
    assert slower.verdict() == (SLOWER_SERVED, "on fresh starts it had 0.714 of native's speed in decode/1")


def test_starts_that_differ_more_than_twofold_still_show_what_is_far_slower() -> None:
    apart = {"decode/1": 1.075}
    assert Confirmed({"decode/1": 0.05}, apart, apart).verdict()[0] == SLOWER_SERVED
    assert Confirmed({"decode/1": 0.5}, apart, apart).verdict()[0] == USED
    assert Speed(0.2, 0.1, 0.3, 8).is_slower(1.5) and not Speed(0.5, 0.4, 0.6, 8).is_slower(1.5)


def test_what_its_own_starts_do_not_repeat_is_not_called_faster() -> None:
    speeds, apart = {"decode/1": 1.15}, {"decode/1": 0.07}
    assert "faster (two" in Confirmed(speeds, apart, {"decode/1": 0.1}).in_words("decode/1")
    assert "no difference can be shown" in Confirmed(speeds, apart, {"decode/1": 0.18}).in_words("decode/1")


def test_a_profile_that_is_slower_on_fresh_starts_is_none() -> None:
    apart = {"decode/1": 0.05, "prefill/1": 0.05}
    assert Confirmed({"decode/1": 0.9, "prefill/1": 0.99}, apart, apart).slower() == {"decode/1": 0.9}
    assert Confirmed({"decode/1": 0.96, "prefill/1": 0.99}, apart, apart).verdict() == (USED, "")


def test_a_plan_goes_by_an_earlier_run_with_the_same_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "profile.tune" / "finished.jsonl", {"arguments": ["--model-path", "m"]}, resume=False)
    for number in range(40):
        journal.measured("check", str(number), lambda: None)
    journal.close()
    plan = ["tune", "m", "--dry-run", "--out", str(tmp_path / "profile.yaml")]
    assert main(plan) == 0
    shown = capsys.readouterr().out
    assert "  40 checks of a recorded call, about" in shown and f"(as in {journal.path})" in shown
    assert "4 fresh starts, about 120 s each (assumed)" in shown
    assert main([*plan, "--", "--tp", "2"]) == 0
    assert str(journal.path) not in capsys.readouterr().out


class TestBudget:
    def test_its_end_is_told_before_what_would_not_end_in_time(self) -> None:
        budget = Budget(time.monotonic() + 100, {"pair": [40.0, 60.0]})
        budget.check("pair")
        with budget.part(0.1), pytest.raises(BudgetOver, match="before more pairs of native and candidates"):
            budget.check("pair")
        budget.check("pair")
        Budget(None, {}).check("start")

    def test_what_was_only_assumed_does_not_keep_a_short_budget_from_its_first_measurement(self) -> None:
        Budget(time.monotonic() + 5, {}).check("about")
        with pytest.raises(BudgetOver):
            Budget(time.monotonic() - 1, {}).check("about")

    def test_the_time_left_is_never_above_what_the_budget_leaves(self) -> None:
        """It is that of the whole budget, also within a part of it. Many take their mean: a few that compile take most of the time."""
        seconds = {"check": [0.1, 0.1, 0.1, 9.7]}
        for deadline, expected in ((None, 250), (time.monotonic() + 1000, 250), (time.monotonic() + 60, 60)):
            budget = Budget(deadline, seconds)
            budget.to_come = {"check": 100}
            with budget.part(0.1):
                assert budget.left() == (pytest.approx(expected, abs=1), expected == 60)

    def test_a_fresh_start_takes_what_the_first_took(self) -> None:
        assert Budget(None, {"about": [7.0]}).typical("start") == (7.0, True) and Budget(None, {}).typical("start") == (120.0, False)


def test_functions_are_tried_whatever_the_settings_select_today() -> None:
    """FlagGems functions are measured even if the chip's profile uses none."""
    settings = replace(load_settings({}), flagos_faster=(), flagos_broken=("mm",))
    assert settings.flagos_functions == ()
    assert unlisted(settings).flagos_functions is None and unlisted(settings).flagos_exclusion_reason("mm") is None


@pytest.mark.parametrize(("others", "expected"), [(0, []), (1, [8]), (2, [9, 8]), (9, [16, 13, 11, 8])])
def test_of_the_calls_beside_what_is_measured_some_are_tried(others: int, expected: list[int]) -> None:
    calls = [{"bytes": 8 + number, "per_pass": {"prefill/traffic": 1}} for number in reversed(range(others))]
    measured = {"bytes": 1, "per_pass": {"decode/1": 1}}
    assert [call["bytes"] for call in calls_to_try([*calls, measured], {"decode/1"})] == [1, *expected]


class OverBefore(Budget):
    """Its time is used up before the first measurement of a kind."""

    def __init__(self, kind: str):
        super().__init__(None, {})
        self._kind = kind

    def check(self, kind: str) -> None:
        if kind == self._kind:
            raise BudgetOver(f"before more {kind}")


@pytest.mark.parametrize("kind", ["check", "time", "pair", "start"])
def test_what_the_time_does_not_suffice_for_stays_with_sglang(tmp_path: Path, kind: str) -> None:
    call = {"op": "silu_and_mul", "class": "SiluAndMul", "call": "1x8", "per_pass": {"decode/1": 1}, "bytes": 8, "file": None}
    timed_half = {"own": {"us": 2e5}, "theirs": {"us": 1e5, "ratio": (0.5, 0.5, 0.5)}}
    known = {"check": {"status": "ok", "message": ""}, "time": timed_half}
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    journal.measured("record", "calls", lambda: {"layers": [call | {"dtype": "float32"}], "functions": []})
    for earlier in list(known)[: list(known).index(kind) if kind in known else None]:
        journal.measured(earlier, "silu_and_mul: vendor.a: SiluAndMul 1x8", lambda earlier=earlier: known[earlier])
    bench: Any = PlantedBench({"silu_and_mul": 0.1})
    bench.environ_of = lambda path: {}
    rows = [{"impl": "vendor.a", "packages": ["json"], "why_not": None}]
    about = {**outcome().about, "implementations": {"silu_and_mul": rows}, "graphs": {"prefill": False, "decode": False}}
    bench.about, bench.know = lambda: about, lambda about: None
    tuning = Tuning(Job(tmp_path), bench, journal, lambda text: None, lambda path, outcome: None)
    tuning.budget = OverBefore(kind)
    found = tuning.run()
    journal.close()
    (candidate,) = found.candidates
    assert found.incomplete == f"before more {kind}" and found.confirmed is None and not found.why_native
    if kind == "start":
        assert candidate.status == USED and found.used == choice_of([candidate]) and found.served["decode/1"].ratio > 1.1
    else:
        assert (candidate.status, candidate.reason, found.used) == (UNDECIDED, found.incomplete, NATIVE)
    profile.write(tmp_path / "profile.yaml", found, Baseline())
    assert (measured_in(tmp_path / "profile.yaml") or {})["incomplete"] == found.incomplete


def test_a_function_is_judged_by_the_phases_that_have_graphs(tmp_path: Path) -> None:
    """With ``flagos_scope: graphs`` it runs nowhere else. SGLang has no prefill graphs of GPT-2."""

    def row_of(function: str, **per_pass: int) -> dict[str, Any]:
        of_steps = {f"{phase}/1": count for phase, count in per_pass.items()}
        return {"function": function, "key": function, "args": [], "kwargs": {}, "call": "8", "bytes": 8, "number": 0, "per_pass": of_steps}

    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    functions = [row_of("mul", prefill=48, decode=2), row_of("tanh", prefill=48)]
    journal.measured("record", "calls", lambda: {"layers": [], "functions": functions})
    bench: Any = PlantedBench({})
    about = {**outcome().about, "implementations": {}, "scope": "graphs", "graphs": {"prefill": False, "decode": True}}
    bench.about, bench.know = lambda: about, lambda about: None
    tuning = Tuning(Job(tmp_path), bench, journal, lambda text: None, lambda path, outcome: None)
    tuning.budget = OverBefore("check")
    (candidate,) = tuning.run().candidates
    journal.close()
    assert candidate.name == "mul" and [call["per_pass"] for call in candidate.calls] == [{"decode/1": 2}]
