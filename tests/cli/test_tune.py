# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl tune`` in this process. The engine is a stand-in with planted times; its steps, files and exit codes are the real ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sglang_fl.cli import main, tune_run
from sglang_fl.tune import tuning
from sglang_fl.tune.bench import NATIVE, Choice, StartFailed
from sglang_fl.tune.budget import Budget, BudgetOver
from sglang_fl.tune.engine import EngineFailed
from sglang_fl.tune.journal import Journal
from sglang_fl.tune.judge import OUTSIDE, SLOWER, Candidate
from sglang_fl.tune.served import cases

WITH = {"chip": "cpu", "driver": "none", "versions": {"sglang": "2"}, "model": "M hidden_size=8", "tp": 1}
CALL = {"call": "1x8", "per_pass": {"decode/1": 1, "prefill/1": 1}, "bytes": 8, "file": None, "dtype": "float32"}
GAIN = 0.1


class StandIn:
    """Each operator has the implementation vendor.new, which saves a part of a step."""

    ops = ("rms_norm", "silu_and_mul")
    functions: tuple[str, ...] = ()
    starts, is_up, model = 1, True, WITH["model"]
    fails_to_start = False
    refused: Mapping[str, str] = {}

    def __init__(self, *_: Any):
        self.cases, self._rng, self._choice = cases([1]), np.random.default_rng(0), NATIVE

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *error: object) -> None: ...

    def about(self) -> dict[str, Any]:
        rows = [{"impl": "vendor.new", "packages": ["json"], "why_not": None}]
        about = {"longest": 64, "vocabulary": 64, "plain_cpu": True, "scope": "everywhere", "graphs": {"prefill": False, "decode": False}}
        return {**about, "conditions": {**WITH, "model": self.model}, "implementations": dict.fromkeys(self.ops, rows)}

    def know(self, about: Any) -> None: ...
    def send(self, requests: Any) -> None: ...
    def show(self) -> None: ...
    def start(self, environ: Any) -> None: ...
    def stop(self) -> None: ...

    def environ_of(self, path: Path | None) -> dict[str, str]:
        return {}

    def use(self, choice: Choice) -> dict[str, str]:
        if self.fails_to_start:
            raise StartFailed("engine: it ended during the start")
        self._choice = choice
        return {name: why for name, why in self.refused.items() if name in {*dict(choice.impls), *choice.functions}}

    def round(self, number: int) -> dict[str, float]:
        seconds = 1 - GAIN * len({*dict(self._choice.impls), *self._choice.functions})
        return {str(case): seconds * (1 + 0.002 * self._rng.standard_normal()) for case in self.cases}

    def ask(self, do: str, **values: Any) -> Any:
        if do == "recorded":
            layers = [CALL | {"op": op, "class": op, "number": number} for number, op in enumerate(self.ops)]
            functions = [CALL | {"key": name, "function": name, "number": 0, "args": [], "kwargs": {}} for name in self.functions]
            return {"layers": layers, "functions": functions}
        return {"own": {"us": 2e5}, "theirs": {"us": 1e5, "ratio": (0.5, 0.5, 0.5)}}


class RightChecker:
    """Finds every candidate right."""

    def __init__(self, *_: Any): ...
    def __enter__(self) -> "RightChecker":
        return self

    def __exit__(self, *error: object) -> None: ...
    def run(self, number: int) -> dict[str, Any]:
        return {"status": "ok", "message": ""}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandIn]:
    one: type[StandIn] = type("OfOneTest", (StandIn,), {})
    monkeypatch.setattr(tune_run, "Bench", one)
    monkeypatch.setattr(tuning, "Checker", RightChecker)
    monkeypatch.chdir(tmp_path)
    return one


@pytest.fixture
def over_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The budget is used up before the first measurement of a kind."""

    def plant(kind: str | None) -> None:
        def check(self: Budget, asked: str) -> None:
            if asked == kind:
                raise BudgetOver(f"before more {asked}")

        monkeypatch.setattr(Budget, "check", check)

    return plant


def old_profile(path: Path, **entries: str) -> str:
    """A profile that was measured with another SGLang, and its text. An entry's value is the implementation in use."""
    rows = {
        op: {"impl": impl, "packages": ["json"], "candidates": {impl: {"status": "used", "reason": "old"}}} for op, impl in entries.items()
    }
    orders = {op: [f"impl:{impl}", "sglang"] for op, impl in entries.items()}
    with_ = {**WITH, "versions": {"sglang": "1"}, "sources": {}}
    path.write_text(yaml.safe_dump({"op_backends": orders, "measured": {"with": with_, "entries": rows}}))
    return path.read_text()


def read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The choice of operators in a profile, and its ``measured``."""
    found = yaml.safe_load(path.read_text())
    return {op: order[0] for op, order in found["op_backends"].items() if order != ["sglang"]}, found["measured"]


class TestUpdate:
    @pytest.mark.parametrize("kind", ["noise", "record", "check", "pair"])
    def test_what_is_not_measured_again_yet_stays_and_is_measured_when_resumed(
        self, stand_in: Any, over_before: Any, tmp_path: Path, kind: str
    ) -> None:
        path = tmp_path / "mine.yaml"
        old_profile(path, rms_norm="vendor.new", silu_and_mul="vendor.new")
        over_before(kind)
        for more in ([], ["--resume"]):
            assert main(["tune", "m", "--update", str(path), *more]) == 3
            choice, measured = read(path)
            assert choice == {"rms_norm": "impl:vendor.new", "silu_and_mul": "impl:vendor.new"}
            assert measured["with"]["versions"] == {"sglang": "1"} and measured["incomplete"]
            assert {entry["candidates"]["vendor.new"]["reason"] for entry in measured["entries"].values()} == {"old"}
        over_before(None)
        assert main(["tune", "m", "--update", str(path), "--resume"]) == 0
        choice, measured = read(path)
        assert measured["with"]["versions"] == {"sglang": "2"} and "incomplete" not in measured and len(choice) == 2
        assert all("times native" in entry["candidates"]["vendor.new"]["reason"] for entry in measured["entries"].values())
        assert not (tmp_path / "profile.yaml").exists(), "it is written where it was read"

    def test_what_has_not_changed_is_not_measured(self, stand_in: Any, tmp_path: Path, capsys: Any) -> None:
        assert main(["tune", "m"]) == 0
        before = (tmp_path / "profile.yaml").read_text()
        assert main(["tune", "m", "--update", "profile.yaml"]) == 0
        assert "profile.yaml is up to date: nothing that it was measured with has changed" in capsys.readouterr().out
        assert (tmp_path / "profile.yaml").read_text() == before and not list((tmp_path / "profile.update").iterdir())

    def test_another_models_profile_is_refused(self, stand_in: Any, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "mine.yaml"
        before = old_profile(path, rms_norm="vendor.new")
        stand_in.model = "N hidden_size=16"
        for _ in range(2):  # and leaves nothing to continue
            assert main(["tune", "m", "--update", str(path)]) == 2
            assert "the profile is of M hidden_size=8, not of N hidden_size=16" in capsys.readouterr().err
        assert path.read_text() == before

    def test_what_is_no_more_is_dropped_and_listed(self, stand_in: Any, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "mine.yaml"
        old_profile(path, rms_norm="vendor.gone", new_gelu="vendor.new")
        assert main(["tune", "m", "--update", str(path)]) == 0
        choice, measured = read(path)
        assert choice == {"rms_norm": "impl:vendor.new", "silu_and_mul": "impl:vendor.new"} and "new_gelu" not in measured["entries"]
        assert "dropped: new_gelu: " in capsys.readouterr().out

    def only_silu_has_changed(self, path: Path) -> None:
        old_profile(path, rms_norm="vendor.new", silu_and_mul="vendor.new")
        found = yaml.safe_load(path.read_text())
        found["measured"]["with"] |= {"versions": WITH["versions"], "sources": {"email": "another"}}
        found["measured"]["entries"]["silu_and_mul"]["packages"] = ["email"]
        path.write_text(yaml.safe_dump(found))

    def test_what_is_kept_but_cannot_be_used_is_dropped_and_listed(self, stand_in: Any, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "mine.yaml"
        self.only_silu_has_changed(path)
        stand_in.refused = {"rms_norm": "nothing in the model runs on it"}
        assert main(["tune", "m", "--update", str(path)]) == 0
        choice, measured = read(path)
        assert choice == {"silu_and_mul": "impl:vendor.new"} and measured["entries"].keys() == {"silu_and_mul"}
        assert "dropped: rms_norm: nothing in the model runs on it" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("ends_with", "stays", "told"),
        [
            ({"rms_norm", "silu_and_mul"}, "rms_norm", "crashed: silu_and_mul: vendor.new"),
            ({"rms_norm"}, "silu_and_mul", "dropped: rms_norm: the engine ended with it: engine: it ended"),
        ],
    )
    def test_what_ends_the_engine_only_with_what_is_kept_is_found(
        self, stand_in: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, ends_with: set[str], stays: str, told: str
    ) -> None:
        path, use = tmp_path / "mine.yaml", StandIn.use
        self.only_silu_has_changed(path)

        def failing(bench: Any, choice: Choice) -> dict[str, str]:
            if ends_with <= dict(choice.impls).keys():
                raise EngineFailed("engine: it ended")
            return use(bench, choice)

        monkeypatch.setattr(stand_in, "use", failing)
        assert main(["tune", "m", "--update", str(path)]) == 0
        assert read(path)[0] == {stays: "impl:vendor.new"} and told in capsys.readouterr().out

    def test_functions_that_are_new_are_measured(self, stand_in: Any, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.delenv("USE_FLAGGEMS", raising=False)
        path = tmp_path / "mine.yaml"
        old_profile(path, rms_norm="vendor.new")
        stand_in.functions = ("mul",)
        assert main(["tune", "m", "--update", str(path)]) == 0
        assert read(path)[1]["entries"]["flag_gems.mul"]["status"] == "used"

    @pytest.mark.parametrize("text", ["measured: {with: 7, entries: {}}", "measured: {entries: {}}", "prefer: vendor"])
    def test_what_tune_did_not_write_is_refused(self, stand_in: Any, tmp_path: Path, capsys: Any, text: str) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        assert main(["tune", "m", "--update", "mine.yaml"]) == 2
        assert "was not written by sglang-fl tune" in capsys.readouterr().err


def test_an_engine_that_does_not_start_is_no_candidates_fault(stand_in: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    use = StandIn.use

    def failing(self: Any, choice: Choice) -> dict[str, str]:
        self.fails_to_start = choice != NATIVE  # in the pairs of a candidate, as after a crash of the engine
        return use(self, choice)

    monkeypatch.setattr(stand_in, "use", failing)
    assert main(["tune", "m"]) == 1
    assert "the engine failed: engine: it ended during the start" in capsys.readouterr().out
    journal = (tmp_path / "profile.tune" / "journal.jsonl").read_text()
    assert "crashed" not in journal and not (tmp_path / "profile.yaml").exists()
    monkeypatch.setattr(stand_in, "use", use)
    assert main(["tune", "m", "--resume"]) == 0 and len(read(tmp_path / "profile.yaml")[0]) == 2


def resumed(tmp_path: Path, stand_in: Any) -> tuning.Tuning:
    journal = Journal(tmp_path / "journal.jsonl", {}, resume=False)
    journal.measured("check", "x", lambda: 1)
    return tuning.Tuning(tuning.Job(tmp_path), stand_in(), journal, print, lambda path, outcome: None)


def test_an_engine_that_fails_with_the_profile_on_a_fresh_start_leaves_everything_to_sglang(
    stand_in: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def start(self: Any, environ: Mapping[str, str]) -> None:
        if environ["profile"]:
            raise EngineFailed("engine: it ended during the start")

    monkeypatch.setattr(stand_in, "environ_of", lambda self, path: {"profile": str(path or "")})
    monkeypatch.setattr(stand_in, "start", start)
    assert main(["tune", "m"]) == 0
    choice, measured = read(tmp_path / "profile.yaml")
    why = "on a fresh start the engine failed with it: engine: it ended during the start"
    assert choice == {} and measured["sglang_everywhere"] == why and f"SGLang's own everywhere: {why}" in capsys.readouterr().out
    assert {entry["candidates"]["vendor.new"]["status"] for entry in measured["entries"].values()} == {"undecided"}


def test_a_recording_that_fails_in_a_new_engine_is_no_candidates_fault(stand_in: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = resumed(tmp_path, stand_in)

    def failing() -> None:
        raise EngineFailed("engine: no answer to tune in time")

    monkeypatch.setattr(run, "_recording", failing)
    with pytest.raises(EngineFailed):
        run._timing(Candidate("rms_norm", "vendor.new", "json"), CALL)


def test_what_the_journal_has_is_not_to_come(stand_in: Any, tmp_path: Path) -> None:
    run = resumed(tmp_path, stand_in)
    run.budget.to_come["check"] = 2
    assert run._measured("check", "x", lambda: 2) == 1 and run.budget.to_come["check"] == 1


@pytest.mark.parametrize("kind", ["check", "time", "pair"])
def test_recorded_calls_are_kept_until_all_candidates_are_checked_and_timed(
    stand_in: Any, tmp_path: Path, over_before: Any, monkeypatch: Any, kind: str
) -> None:
    calls, ask = tmp_path / "profile.tune" / "calls", StandIn.ask

    def saving(bench: Any, do: str, **values: Any) -> Any:
        answer = ask(bench, do, **values)
        if do == "recorded":
            for row in answer["layers"]:
                row["file"] = f"{values['directory']}/{row['op']}.call"
                Path(row["file"]).write_text("")
        return answer

    monkeypatch.setattr(stand_in, "ask", saving)
    calls.mkdir(parents=True)
    (calls / "of a killed run").write_text("")
    over_before(kind)
    assert main(["tune", "m"]) == 3
    assert sorted(path.name for path in calls.glob("*")) == ([] if kind == "pair" else ["rms_norm.call", "silu_and_mul.call"])
    monkeypatch.setattr(stand_in, "ask", ask)  # a new engine records again, and saves nothing
    over_before(None)
    assert main(["tune", "m", "--resume"]) == 0 and not calls.exists()


def test_only_the_first_recording_is_saved(stand_in: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run, saved, ask = resumed(tmp_path, stand_in), [], StandIn.ask
    run.outcome.about = stand_in().about()

    def asked(bench: Any, do: str, **values: Any) -> Any:
        if do == "recorded":
            saved.append(values["directory"])
        return ask(bench, do, **values)

    monkeypatch.setattr(stand_in, "ask", asked)
    run._timing(Candidate("rms_norm", "vendor.new", "json"), {**CALL, "class": "rms_norm"})
    run._record()
    assert saved == [None, str(tmp_path / "calls")]


OUTSIDE_OF_GRAPHS = {
    "own": {"us": None, "host_us": 10.0, "uncaptured": "RuntimeError: Cannot copy"},
    "theirs": {"us": None, "host_ratio": (6.0, 5.9, 6.1)},
}
IN_A_GRAPH = {
    "own": {"us": 2.0, "host_us": 10.0, "uncaptured": None},
    "theirs": {"us": 1.0, "ratio": (0.5, 0.5, 0.5), "host_ratio": (6.0, 5.9, 6.1)},
}


@pytest.mark.parametrize(
    ("impl", "scope", "found", "status", "reason"),
    [
        (None, "graphs", [IN_A_GRAPH, OUTSIDE_OF_GRAPHS], "not measured", "0.5 times native's time in the median (0.5 to 0.5)"),
        (
            None,
            "graphs",
            [OUTSIDE_OF_GRAPHS],
            OUTSIDE,
            "PyTorch's own call cannot be captured in a graph: RuntimeError: Cannot copy (call 0)",
        ),
        (None, "everywhere", [IN_A_GRAPH, OUTSIDE_OF_GRAPHS], SLOWER, "6 times native's time (call 1)"),
        ("vendor.new", "graphs", [IN_A_GRAPH, OUTSIDE_OF_GRAPHS], SLOWER, "6 times native's time (call 1)"),
    ],
)
def test_what_native_cannot_be_captured_with_is_called_outside_of_graphs(
    stand_in: Any, tmp_path: Path, monkeypatch: Any, impl: str | None, scope: str, found: list[Any], status: str, reason: str
) -> None:
    run = resumed(tmp_path, stand_in)
    run.outcome.about = {"scope": scope, "graphs": {"prefill": True, "decode": True}}
    calls = [{**CALL, "key": "to_copy", "call": f"call {number}", "number": number} for number in range(len(found))]
    candidate = Candidate("to_copy", impl, "json", calls)
    monkeypatch.setattr(run, "_timing", lambda candidate, call: found[call["number"]])
    run._time(candidate)
    assert (candidate.status, candidate.reason) == (status, reason)


def test_the_table_says_what_was_measured_alone_and_what_served(
    stand_in: Any, tmp_path: Path, monkeypatch: Any, over_before: Any, capsys: Any
) -> None:
    """Candidates that save half of 0.2 s alone, and nothing when served."""
    monkeypatch.setattr(f"{__name__}.GAIN", 0.0)
    monkeypatch.setattr(RightChecker, "run", lambda self, number: {"status": "failed" if number else "ok", "message": "it is off by 1"})
    over_before("start")
    assert main(["tune", "m", "--budget", "5m"]) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "Used: time alone divided by native's, and the µs of a step that this saves" in shown
    assert "rms_norm: vendor.new 0.50 100000.0 100000.0 together 100000.0 100000.0 native's step" in shown
    assert "wrong: silu_and_mul: vendor.new it is off by 1 (1x8)" in shown
    assert "(the budget ends in 5 min)" in shown
    assert ": no difference can be shown" in shown or "below the smallest effect" in shown
    assert "The choice was not confirmed on fresh starts" in shown and "undecided" not in shown


def test_what_is_being_measured_is_to_come(stand_in: Any, tmp_path: Path) -> None:
    run, shown = resumed(tmp_path, stand_in), []
    run.budget.to_come = {"start": 4}
    run._say, run._step = lambda text: shown.append((text, run.budget.to_come["start"])), "fresh starts"
    for number in range(4):
        run._measured("start", str(number), lambda: None)
        run._said = float("-inf")
    assert shown == [("fresh starts", 4), *((f"fresh starts done: {number}", 4 - number) for number in (1, 2, 3))]


def test_a_lost_file_of_a_call_is_told(stand_in: Any, tmp_path: Path, over_before: Any, capsys: Any) -> None:
    over_before("check")
    assert main(["tune", "m"]) == 3
    path = tmp_path / "profile.tune" / "journal.jsonl"
    path.write_text(path.read_text().replace('"file": null', '"file": "/no/such.call"'))
    assert main(["tune", "m", "--resume"]) == 2
    assert "/no/such.call is missing" in capsys.readouterr().err


def test_each_slice_of_a_budget_makes_some_fresh_starts(stand_in: Any, monkeypatch: Any, capsys: Any) -> None:
    """Once all is decided, a slice starts no engine for anything else, and shows the table."""
    left, started = {"start": 1}, []

    def check(self: Budget, kind: str) -> None:
        if kind == "start":
            left["start"] -= 1
            if left["start"] < 0:
                raise BudgetOver("before more fresh starts")

    monkeypatch.setattr(Budget, "check", check)
    monkeypatch.setattr(stand_in, "start", lambda bench, environ: started.append(environ))
    codes = [main(["tune", "m"])]
    decided = capsys.readouterr().out.partition("Used: ")[2].partition("The choice")[0]

    def used(*_: Any, **values: Any) -> Any:
        raise AssertionError(values)

    for name in ("about", "use", "ask", "send", "show"):
        monkeypatch.setattr(stand_in, name, used)
    while codes[-1] == 3:
        left["start"] = 1
        codes.append(main(["tune", "m", "--resume"]))
        shown = capsys.readouterr().out
        assert decided in shown and "fresh starts: native" in shown and "starting the engine" not in shown and "serving" not in shown
    assert codes == [3, 3, 3, 0] and len(started) == 4 and "rms_norm: vendor.new" in decided


def test_the_noise_stays_what_it_was_when_calls_were_recorded(stand_in: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What follows was decided by it, and more of it would cost a start of an engine."""
    pairs = iter(range(10))

    def check(self: Budget, kind: str) -> None:
        if kind == "start" or (kind == "noise" and next(pairs, None) is None):
            raise BudgetOver(f"before more {kind}")

    monkeypatch.setattr(Budget, "check", check)
    assert main(["tune", "m"]) == 3
    monkeypatch.setattr(Budget, "check", lambda self, kind: None)
    assert main(["tune", "m", "--resume"]) == 0
    lines = (tmp_path / "profile.tune" / "finished.jsonl").read_text().splitlines()
    assert sum(line.get("kind") == "noise" for line in map(json.loads, lines)) == 10


def test_a_run_that_has_ended_is_not_resumed(stand_in: Any, capsys: Any) -> None:
    assert main(["tune", "m"]) == 0
    assert main(["tune", "m", "--resume"]) == 2
    assert "has ended" in capsys.readouterr().err
    assert main(["tune", "m"]) == 0


def test_other_conditions_are_not_resumed(stand_in: Any, tmp_path: Path, over_before: Any, monkeypatch: Any, capsys: Any) -> None:
    over_before("check")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert main(["tune", "./model"]) == 3
    (model / "config.json").write_text('{"a": 1}')
    monkeypatch.setenv("SGLANG_FL_STRICT", "1")
    assert main(["tune", "./model", "--resume"]) == 2
    told = capsys.readouterr().err
    assert "model's configuration was" in told and "settings was" in told


def test_another_chip_driver_or_kernel_is_not_resumed(
    stand_in: Any, backend: Any, tmp_path: Path, over_before: Any, monkeypatch: Any, capsys: Any
) -> None:
    name = backend()
    monkeypatch.setenv("SGLANG_FL_PLUGIN_MODULES", name)
    over_before("check")
    assert main(["tune", "m"]) == 3
    with (tmp_path / f"{name}.py").open("a") as file:
        file.write("# another\n")
    monkeypatch.setattr(tune_run, "driver", lambda: "580")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr(tune_run, "chip_name", lambda device: "Chip 2")
    assert main(["tune", "m", "--resume"]) == 2
    told = capsys.readouterr().err
    assert "chip was cpu and is Chip 2" in told and "driver was none and is 580" in told and f"source of {name} was " in told


def test_a_users_file_is_a_condition_and_the_profile_that_is_written_is_none(
    stand_in: Any, tmp_path: Path, over_before: Any, monkeypatch: Any, capsys: Any
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("strict: true\n")
    monkeypatch.setenv("SGLANG_FL_CONFIG", "mine.yaml,profile.yaml")
    (tmp_path / "profile.yaml").write_text("")
    over_before("check")
    assert main(["tune", "m"]) == main(["tune", "m", "--resume"]) == 3
    assert "Use it with SGLANG_FL_CONFIG=mine.yaml,profile.yaml" in capsys.readouterr().out
    mine.write_text("strict: false\n")
    assert main(["tune", "m", "--resume"]) == 2
    assert "settings files was " in capsys.readouterr().err


def test_two_profiles_have_two_folders(stand_in: Any, tmp_path: Path) -> None:
    assert main(["tune", "m", "--out", "model.0.6b"]) == main(["tune", "m", "--out", "model.0.5b"]) == 0
    assert {path.name for path in tmp_path.glob("*.tune")} == {"model.0.6b.tune", "model.0.5b.tune"}


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["/no/such"], "there is no model '/no/such'"),
        (["./modle"], "did you mean 'model'?"),
        (["m", "--traffic", "/no/such"], "--traffic: '/no/such' cannot be read"),
        (["m", "--html", "/no/x"], "--html: '/no/x' cannot be written"),
        (["m", "--update", "/no/such.yaml"], "--update: there is no file '/no/such.yaml'"),
        (["m", "--out", ""], "--out: '.' cannot be written"),
        (["m", "--out", "taken.yaml"], "taken.tune is a file"),
    ],
)
def test_what_cannot_be_is_told_before_the_run(
    stand_in: Any, tmp_path: Path, capsys: Any, options: list[str], told: str, more: list[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "taken.tune").write_text("")
    assert main(["tune", *options, *more]) == 2
    assert told in capsys.readouterr().err


def test_a_journal_of_a_finished_run_has_its_conditions_first(stand_in: Any, tmp_path: Path) -> None:
    assert main(["tune", "m"]) == 0
    first, *rest = (json.loads(line) for line in (tmp_path / "profile.tune" / "finished.jsonl").read_text().splitlines())
    assert first["for"]["arguments"] == ["--model-path", "m"] and {line["kind"] for line in rest} >= {"about", "noise", "record", "start"}
