# SPDX-License-Identifier: Apache-2.0
"""What ``sglang-fl tune`` says of bad input and of an early end, and its plans. No engine is started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_fl.cli import main, tune_run
from sglang_fl.tune.bench import StartFailed
from sglang_fl.tune.served import cases

ABOUT = {"conditions": {"chip": "cpu", "model": "M", "tp": 1}, "implementations": {}, "plain_cpu": True, "vocabulary": 64}


class StandIn:
    """An engine that describes itself and then fails, if ``error`` does not come first."""

    starts, is_up = 1, True
    error: BaseException = StartFailed("engine: it ended during the start")
    describes = False

    def __init__(self, *_: Any):
        self.cases = cases([1])

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *error: object) -> None: ...
    def know(self, about: Any) -> None: ...
    def about(self) -> dict[str, Any]:
        if not self.describes:
            raise self.error
        return ABOUT

    def use(self, choice: Any) -> dict[str, str]:
        raise self.error


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    one: type[StandIn] = type("OfOneTest", (StandIn,), {})
    monkeypatch.setattr(tune_run, "Bench", one)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    return one


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs tune, which must refuse. Returns what it says."""

    def run(*arguments: str) -> str:
        try:
            assert main(["tune", *arguments]) == 2
        except SystemExit as error:  # argparse's
            assert error.code == 2
        return capsys.readouterr().err

    return run


JOURNAL = Path("profile.tune", "journal.jsonl")


def write_journal(*lines: Any) -> None:
    JOURNAL.parent.mkdir(exist_ok=True)
    JOURNAL.write_text("".join(json.dumps(line) + "\n" for line in lines))


class TestJournal:
    @pytest.mark.parametrize("options", [["--dry-run"], ["--resume"], ["--resume", "--dry-run"]])
    @pytest.mark.parametrize(
        "lines", [[{"a": 1}], [{"for": 3}], [[]], [{"for": {}}, {"kind": [], "key": "a", "value": 1, "seconds": 1}], [{"for": {}}, {}]]
    )
    def test_what_is_no_line_of_a_journal_is_named(self, refused: Refused, lines: list[Any], options: list[str]) -> None:
        write_journal(*lines)
        assert f"journal.jsonl:{len(lines)}: not a line of a journal. Delete the file" in refused("./model", *options)

    @pytest.mark.parametrize("options", [["--dry-run"], ["--resume"]])
    def test_what_is_no_json_is_named(self, refused: Refused, options: list[str]) -> None:
        JOURNAL.parent.mkdir()
        JOURNAL.write_bytes(b"\xff\n")
        assert "journal.jsonl cannot be read: " in refused("./model", *options)

    def test_a_folder_that_cannot_be_made_is_named(self, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def mkdir(path: Path, *_: Any, **__: Any) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("sglang_fl.tune.journal.Path.mkdir", mkdir)
        assert "journal.jsonl cannot be written: Read-only file system. Give another --out" in refused("./model")


class TestTraffic:
    @pytest.mark.parametrize("more", [[], ["--dry-run"]])
    @pytest.mark.parametrize(
        ("sampling", "told"),
        [
            ({"temperture": 1}, "SGLang has no 'temperture'; did you mean 'temperature'?"),
            ({"temperature": -1}, "temperature must be a non-negative finite number, got -1"),
            ({"temperature": "hot"}, "SGLang refuses {"),
        ],
    )
    def test_sampling_parameters_are_checked_before_an_engine_starts(
        self, refused: Refused, sampling: dict[str, Any], told: str, more: list[str]
    ) -> None:
        requests = [{"prompt": "a", "sampling_params": {"top_k": -1, "stop": ["b"]}}, {"input_len": 3, "sampling_params": sampling}]
        Path("requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
        said = refused("./model", "--traffic", "requests.jsonl", *more)
        assert "requests.jsonl:2: sampling_params: " in said and told in said


MERGED = {
    "op_backends": {"rms_norm": ["impl:vendor.a", "sglang"], "topk": ["sglang"]},
    "flagos_faster": ["mul"],
    "measured": {
        "with": {"model": "M", "versions": {"torch": "1"}, "sources": {}},
        "confirmed": {"decode/1": 1.1},
        "entries": {
            "rms_norm": {"impl": "vendor.a", "packages": ["a"], "candidates": {"vendor.a": {"status": "used", "reason": ""}}},
            "flag_gems.mul": {"status": "used", "reason": "", "packages": ["flag_gems"]},
        },
    },
}


def profile(path: Path, *keys: str, value: Any = None) -> str:
    """A profile of tune's, with another value behind the keys, if there are any."""
    whole = found = json.loads(json.dumps(MERGED))
    for key in keys[:-1]:
        found = found[key]
    if keys:
        found[keys[-1]] = value
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return str(path)


class TestProfiles:
    @pytest.mark.parametrize("update", [False, True])
    @pytest.mark.parametrize(
        ("keys", "value", "told"),
        [
            ("measured entries rms_norm", 5, "measured: entries: rms_norm: expected keys with a value each, found 5"),
            ("measured entries rms_norm", {"imp": "x", "candidates": {}}, "entries: rms_norm: it has no 'impl' but 'imp'"),
            ("measured entries rms_norm candidates", [], "entries: rms_norm: candidates: expected keys with a value each, found []"),
            ("measured entries rms_norm candidates vendor.a", {"statsu": "used"}, "candidates: vendor.a: it has no 'status' but 'statsu'"),
            ("measured entries rms_norm packages", 3, "entries: rms_norm: packages: expected a list of names, found 3"),
            ("measured entries flag_gems.mul", {"status": 1}, "entries: flag_gems.mul: status: expected a text, found 1"),
            ("measured with versions", 1, "measured: with: versions: expected names with a value each, found 1"),
            ("measured models", 1, "measured: models: expected names with a value each, found 1"),
            ("op_backends topk", [], "edited.yaml:5: op_backends: topk: expected a list of names, such as [sglang], found []"),
            ("op_backends", 7, "edited.yaml:1: op_backends: expected operators with a list of names each, found 7"),
            ("flagos_faster", 7, "flagos_faster: expected a list of names, found 7"),
            ("flagos_scope", "graph", "flagos_scope: expected graphs or everywhere, found 'graph'"),
        ],
    )
    def test_what_was_edited_wrongly_is_named(
        self, refused: Refused, tmp_path: Path, keys: str, value: Any, told: str, update: bool
    ) -> None:
        path = profile(tmp_path / "edited.yaml", *keys.split(), value=value)
        said = refused(*(["./model", "--update", path, "--dry-run"] if update else ["--merge", path, "--out", "chip.yaml"]))
        assert told in said and not Path("chip.yaml").exists()

    def test_profiles_of_the_same_name_are_called_by_their_folders(self, refused: Refused, tmp_path: Path) -> None:
        one, two, other = (profile(tmp_path / name) for name in ("d1/profile.yaml", "d2/profile.yaml", "other.yaml"))
        assert main(["tune", "--merge", one, "d1/../d2/profile.yaml", other, "--out", "chip.yaml"]) == 0
        text = Path("chip.yaml").read_text()
        assert list(yaml.safe_load(text)["measured"]["models"]) == ["d1", "d2", "other"] and "profiles d1, d2, other, by" in text
        profile(tmp_path / "d3" / "d1.yaml")
        for paths in ([one, one], [one, two, "d3/d1.yaml"]):
            assert "two of the profiles have the same name: " in refused("--merge", *paths, "--out", "sum.yaml")


class TestFiles:
    @pytest.mark.parametrize("option", ["--out", "--html"])
    @pytest.mark.parametrize("more", [[], ["--dry-run"]])
    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("/proc/x", "cannot be written: No such file or directory"),
            ("model", "cannot be written: it is a folder or a device"),
            ("no/x.yaml", "cannot be written: there is no folder "),
            ("x" * 300, "cannot be written: File name too long"),
        ],
    )
    def test_what_cannot_be_written_is_refused_at_once(
        self, refused: Refused, tmp_path: Path, option: str, name: str, told: str, more: list[str]
    ) -> None:
        said = refused("./model", option, name, *more)
        assert f"{option}: {name!r} {told}" in said
        assert refused("--merge", profile(tmp_path / "one.yaml"), "--out", name) == said.replace("--html", "--out")
        assert {path.name for path in tmp_path.iterdir()} == {"model", "one.yaml"}


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--dry-run", "--resume"], "takes only profiles and --out: leave out --dry-run, --resume"),
            (["--budget", "5m", "--html", "x.html", "--batch", "1"], "leave out --budget, --html, --batch"),
            (["--traffic", "x", "--input-len", "1", "--output-len", "1"], "leave out --traffic, --input-len, --output-len"),
            (["--update", "x", "--", "--tp", "2"], "leave out --update, arguments of the server"),
        ],
    )
    def test_what_a_sum_would_ignore_is_refused(self, refused: Refused, tmp_path: Path, arguments: list[str], told: str) -> None:
        one = profile(tmp_path / "one.yaml")
        assert told in refused("--merge", one, "--out", "chip.yaml", *arguments)
        assert "leave out a MODEL" in refused("./model", "--merge", one, "--out", "chip.yaml")
        assert "--out with another file" in refused("--merge", one, "--out", "model/../one.yaml")

    def test_a_model_is_given_once(self, refused: Refused) -> None:
        for word in ("--model-path", "--model=other"):
            assert f"given twice, as MODEL and after --: leave out {word.partition('=')[0]}" in refused("./model", "--", word, "other")
        assert "name the MODEL" in refused("")

    def test_arguments_of_the_server_go_behind_two_dashes(self, refused: Refused) -> None:
        assert "unrecognized arguments: --tp 2 (arguments of sglang.launch_server go after --)" in refused("./model", "--tp", "2")
        assert "--bugdet 2m (did you mean '--budget'? arguments of" in refused("./model", "--bugdet", "2m")


class TestPlan:
    @pytest.fixture
    def planned(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def run(*options: str) -> str:
            assert main(["tune", "./model", "--dry-run", *options]) == 0
            return capsys.readouterr().out

        return run

    def measured(self, monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
        """A journal with so many measurements of each kind."""
        monkeypatch.setattr(tune_run, "_conditions", lambda *_: {})
        lengths = {"prefill": 64, "decode": 16, "output": 16}
        head = {"arguments": ["--model-path", "./model"], "lengths": lengths, "batches": [1, 4]}
        rows = [
            {"kind": kind, "key": f"{kind}: {number}", "value": 0, "seconds": 2.0}
            for kind, count in counts.items()
            for number in range(count)
        ]
        write_journal({"for": head}, *rows)

    def test_what_the_journal_has_is_not_to_come(self, planned: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        whole = planned()
        self.measured(monkeypatch, about=1, noise=10, record=1, check=2)
        assert "continue it with --resume, or delete the file" in planned()
        shown = planned("--resume")
        assert "journal.jsonl has 1 first start of an engine, 10 pairs of native and itself, 1 recording of all calls, 2 checks" in shown
        checks = int(whole.split(" checks of")[0].split()[-1])
        assert f"  {checks - 2:2} checks of a recorded call, about 2 s each (as in" in shown and " 4 fresh starts, about 2 s" in shown
        assert (
            " 1 start of an engine" in shown
            and "pairs of native and itself, about" not in shown
            and "recording of all calls, about" not in shown
        )

    def test_once_a_fresh_start_was_made_only_those_are_to_come(self, planned: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured(monkeypatch, about=1, noise=10, record=1, check=2, start=1)
        shown = planned("--resume").partition("Still to come:\n")[2].splitlines()
        assert len(shown) == 2 and shown[0].startswith("     3 fresh starts") and shown[1].startswith("About 1 min. ")

    def test_a_journal_that_no_run_can_continue_is_refused(self, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured(monkeypatch, about=1)
        assert "batches was [1, 4] and is [2]" in refused("./model", "--batch", "2", "--resume", "--dry-run")

    def test_an_update_measures_at_most_what_is_planned(self, planned: Callable[..., str], tmp_path: Path) -> None:
        path = profile(tmp_path / "mine.yaml")
        assert f"Of {path} only the entries whose conditions have changed are measured, so the plan is the most" in planned(
            "--update", path
        )

    def test_a_profile_that_cannot_be_updated_is_refused(self, refused: Refused, tmp_path: Path) -> None:
        path = profile(tmp_path / "chip.yaml", "measured", "models", value={"one": {}})
        assert "it is the sum of several profiles (one)" in refused("./model", "--dry-run", "--update", path)
        (tmp_path / "broken.yaml").write_text("a: [")
        assert "broken.yaml:1: not valid YAML" in refused("./model", "--dry-run", "--update", "broken.yaml")


class TestEarlyEnd:
    """What is said of an engine that fails, an interrupt, and a budget that is too short."""

    SAVED = "Measurements are saved; continue with --resume"

    def test_an_engine_that_fails_at_once_leaves_nothing_to_continue(self, engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune", "./model"]) == 1
        said = capsys.readouterr().out
        assert "the engine failed: engine: it ended during the start" in said and "Its log is in" in said and "--resume" not in said
        engine.describes = True  # and fails later
        assert main(["tune", "./model"]) == 1
        assert self.SAVED in capsys.readouterr().out

    @pytest.mark.parametrize("describes", [False, True])
    def test_an_interrupt_says_how_to_continue(self, engine: Any, capsys: pytest.CaptureFixture[str], describes: bool) -> None:
        engine.error, engine.describes = KeyboardInterrupt(), describes
        assert main(["tune", "./model"]) == 130
        said = capsys.readouterr().err
        assert "sglang-fl: interrupted" in said and (self.SAVED in said) == describes

    def test_of_the_servers_usage_only_the_error_is_shown(self, engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        usage = "\n".join(f"                    [--option-{number} X]" for number in range(14))
        engine.error = StartFailed(f"engine: SystemExit: 2\n{usage}\nsglang serve: error: unrecognized arguments: --foo 3")
        assert main(["tune", "./model", "--", "--foo", "3"]) == 1
        first, second, third = capsys.readouterr().out.splitlines()[-3:]
        assert first == "the engine failed: engine: SystemExit: 2: it refused the server's arguments" and third.startswith("Its log")
        assert second == "sglang serve: error: unrecognized arguments: --foo 3"

    def test_before_the_engine_was_started_there_is_no_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune", "./model", "--budget", "0.0001s", "--html", "z.html"]) == 3
        said = capsys.readouterr().out
        assert "z.html was not written: no engine was started" in said and "Give a longer --budget" in said and "--resume" not in said
        assert not Path("z.html").exists() and not Path("profile.yaml").exists()
