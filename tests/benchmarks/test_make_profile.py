# SPDX-License-Identifier: Apache-2.0
"""benchmarks/make_profile.py: its rule on made-up results, and the profile in the repository against the measured ones."""

import json
import sys
from pathlib import Path
from typing import Any

import make_profile
import pytest
import yaml

from sglang_fl.config import load_settings

EVEN, SLOWER = [1.0, 0.97, 1.03], [1.5, 1.4, 1.6]


@pytest.fixture(autouse=True)
def few_shapes_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_profile, "LEAST_SHAPES", 1)


def op_rows(op: str, flagos: list[Any], triton: list[Any]) -> list[dict[str, Any]]:
    """Rows of SGLang's own layer and of implementations; one ratio, or error text, for each shape."""
    rows: list[dict[str, Any]] = []
    for kind, found in (("sglang", [None] * 4), ("flagos", flagos), ("triton", triton)):
        for shape, ratio in enumerate(found):
            row = {"op": op, "kind": kind, "hidden": 1024, "tokens": 4**shape, "us": 1.0}
            rows.append(row | ({"error": ratio} if isinstance(ratio, str) else {"ratio": ratio} if ratio else {}))
    return rows


def results(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    """Of a model that calls rms_norm and two functions, and a sitting of ops.py."""
    entries = {
        "rms_norm": {"impl": "vendor.cuda", "packages": ["a"], "candidates": {"vendor.cuda": {"status": "used", "reason": "0.9 times"}}},
        "flag_gems.mul": {"status": "wrong", "reason": "it is off", "packages": ["flag_gems"]},
        "flag_gems.abs": {"status": "used", "reason": "0.9 times", "packages": ["flag_gems"]},
    }
    measured = {"with": {"versions": {"torch": "9.9"}}, "confirmed": {"decode/1": 1.1}, "entries": entries}
    tuned = {"op_backends": {"rms_norm": ["impl:vendor.cuda", "sglang"]}, "flagos_faster": ["abs"], "flagos_scope": "graphs"}
    (tmp_path / "profile-made-up.yaml").write_text(yaml.safe_dump({**tuned, "measured": measured}))
    (tmp_path / "triton-made-up.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_the_profile_is_one_that_sglang_fl_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_profile.profile(results(tmp_path, *op_rows("silu_and_mul", [SLOWER], [EVEN])))
    (tmp_path / "nvidia.yaml").write_text(text)
    monkeypatch.setattr("sglang_fl.config.loader.PROFILES", tmp_path)
    settings = load_settings({"SGLANG_FL_PLATFORM": "nvidia"})
    assert dict(settings.op_backends)["rms_norm"] == ("impl:vendor.cuda", "sglang")
    assert settings.flagos_functions == ("abs",) and settings.flagos_broken == ("mul",) and settings.triton_faster == ("silu_and_mul",)
    measured = yaml.safe_load(text)["measured"]
    assert measured["entries"]["flag_gems.mul"]["models"]["profile-made-up"]["reason"] == "it is off"
    assert measured["triton"]["silu_and_mul"]["triton-made-up.json"].startswith("0.667 (0.67 to 0.67) of FlagGems's time")


@pytest.mark.parametrize(
    ("flagos", "triton", "faster"),
    [
        ([SLOWER] * 4, [EVEN] * 4, True),
        ([SLOWER] * 3 + [EVEN], [EVEN] * 3 + [[1.09, 1.0, 1.2]], True),
        ([SLOWER] * 3 + [EVEN], [EVEN] * 3 + [[1.11, 1.0, 1.2]], False),  # the fourth shape has 64 tokens
        ([EVEN] + [SLOWER] * 3, [[1.9, 1.8, 2.0]] + [EVEN] * 3, True),  # with one token, where it is not 1 µs
        ([EVEN] * 4, [EVEN] * 4, False),
        ([SLOWER] * 2, [EVEN, "RuntimeError: no"], False),
        ([SLOWER] * 2, [EVEN], False),
        (["RuntimeError: no", SLOWER], [EVEN, EVEN], True),
        ([], [EVEN], False),
    ],
)
def test_our_triton_kernels_go_before_flaggems_where_they_are_faster(
    flagos: list[Any], triton: list[Any], faster: bool, tmp_path: Path
) -> None:
    text = make_profile.profile(results(tmp_path, *op_rows("rms_norm", flagos, triton)))
    assert yaml.safe_load(text)["triton_faster"] == (["rms_norm"] if faster else [])


def test_all_sittings_must_agree(tmp_path: Path) -> None:
    results(tmp_path, *op_rows("rms_norm", [SLOWER], [EVEN]))
    (tmp_path / "triton-made-up.2.json").write_text(json.dumps({"rows": op_rows("rms_norm", [EVEN], [EVEN])}))
    assert yaml.safe_load(make_profile.profile(tmp_path))["triton_faster"] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"op": None}, "Expected `str`"),
        ({"ratio": [0, 0, 0]}, "Expected `float` > 0"),
        ({"op": "rms_nrom"}, "did you mean 'rms_norm'"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    results(tmp_path, *op_rows("rms_norm", [SLOWER], [EVEN]), op_rows("rms_norm", [SLOWER], [])[-1] | change)
    failed = run("--results", str(tmp_path), "--profile", str(tmp_path / "p.yaml"))
    assert "triton-made-up.json" in failed and told in failed


def run(*arguments: str) -> Any:
    """The command, in this process. Returns what it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_profile.py", *arguments])
        try:
            make_profile.main()
        except SystemExit as ended:
            return ended.code
    return 0


def test_check_compares_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("--results", str(results(tmp_path)), "--profile", str(tmp_path / "nvidia.yaml"))
    assert run(*places) == run(*places, "--check") == 0
    changed = (tmp_path / "nvidia.yaml").read_text().replace("[abs]", "[]")
    (tmp_path / "nvidia.yaml").write_text(changed)
    assert run(*places, "--check") == 1 and "+flagos_faster: [abs]" in capsys.readouterr().out
    assert (tmp_path / "nvidia.yaml").read_text() == changed


def test_the_profile_in_the_repository_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_profile, "LEAST_SHAPES", 6)
    assert make_profile.PROFILE.read_text(encoding="utf-8") == make_profile.profile(make_profile.RESULTS)
