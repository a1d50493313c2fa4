# SPDX-License-Identifier: Apache-2.0
"""What ``sglang-fl tune`` says of bad input and of an early end, and its plans. No engine is started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
