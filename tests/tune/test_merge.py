# SPDX-License-Identifier: Apache-2.0
"""The sum of profiles, ``sglang-fl tune --merge``."""

from pathlib import Path
from typing import Any

import yaml

from sglang_fl.cli import main
from sglang_fl.config import load_settings
from sglang_fl.fingerprint.measured import changes

WITH = {"chip": "Chip 1", "driver": "1", "versions": {"torch": "1"}, "model": "M", "tp": 1, "sources": {"a": "1"}}


def tuned(path: Path, functions: dict[str, str], with_: dict[str, Any] = WITH, **impls: tuple[str, str]) -> str:
    """A profile of tune's. Operator -> (implementation, its status); function -> its status."""
    entries: dict[str, Any] = {}
    for op, (impl, status) in impls.items():
        verdict = {impl: {"status": status, "reason": path.stem}}
        entries[op] = {"impl": impl if status == "used" else "sglang", "packages": ["a"], "candidates": verdict}
    entries |= {f"flag_gems.{name}": {"status": status, "reason": "", "packages": ["flag_gems"]} for name, status in functions.items()}
    orders = {op: [f"impl:{impl}", "sglang"] for op, (impl, status) in impls.items() if status == "used"}
    faster = [name for name, status in functions.items() if status == "used"]
    measured = {"with": with_, "confirmed": {"decode/1": 1.1}, "entries": entries}
    path.write_text(yaml.safe_dump({"op_backends": orders, "flagos_faster": faster, "flagos_scope": "graphs", "measured": measured}))
    return str(path)


def test_what_each_model_that_calls_it_uses_is_used_on_the_chip(tmp_path: Path, capsys: Any) -> None:
    one = tuned(
        tmp_path / "one.yaml",
        {"mul": "used", "add": "used", "mm": "slower served", "cos": "tie", "copy_": "used", "sub": "slower served"},
        rms_norm=("vendor.a", "used"),
        silu_and_mul=("vendor.a", "used"),
        new_gelu=("vendor.a", "not exercised"),
        topk=("vendor.a", "used"),
    )
    two = tuned(
        tmp_path / "two.yaml",
        {"mul": "used", "add": "wrong", "mm": "slower", "copy_": "only outside of graphs", "sub": "wrong"},
        {**WITH, "model": "N", "chip": "Chip 2", "sources": {"b": "1"}},
        rms_norm=("vendor.a", "used"),
        silu_and_mul=("vendor.a", "slower"),
        new_gelu=("vendor.b", "used"),
        topk=("vendor.b", "used"),
    )
    chip = tmp_path / "chip.yaml"
    assert main(["tune", "--merge", one, two, "--out", str(chip)]) == 0
    assert "In use: new_gelu, rms_norm, copy_, mul" in capsys.readouterr().out
    settings = load_settings({"SGLANG_FL_CONFIG": str(chip)})
    used = {op: order[0] for op, order in settings.op_backends if order != ("sglang",)}
    assert used == {"rms_norm": "impl:vendor.a", "new_gelu": "impl:vendor.b"} and settings.flagos_functions == ("copy_", "mul")
    assert settings.flagos_broken == ("add", "sub") and settings.flagos_slower == ("mm",)
    measured = yaml.safe_load(chip.read_text())["measured"]
    assert measured["entries"]["silu_and_mul"]["models"]["two"]["candidates"]["vendor.a"]["status"] == "slower"
    assert measured["models"]["two"]["with"]["chip"] == "Chip 2" and measured["models"]["one"]["confirmed"] == {"decode/1": 1.1}
    # It holds for any model, number of ranks and chip of this kind, but for these versions and sources.
    now = {**WITH, "chip": "Chip 3", "driver": "2", "model": "L", "tp": 2}
    assert {change.what for change in changes(measured, now) if change.entries} == {"the source of a"}
    assert {change.what for change in changes({**measured, "with": {"versions": {"torch": "0"}}}, now)} == {"torch"}


def test_what_cannot_be_added_up_is_refused(tmp_path: Path, capsys: Any) -> None:
    one = tuned(tmp_path / "one.yaml", {}, rms_norm=("vendor.a", "used"))
    other = tuned(tmp_path / "other.yaml", {}, {**WITH, "versions": {"torch": "2"}}, rms_norm=("vendor.a", "used"))
    open_ = Path(tuned(tmp_path / "open.yaml", {}, rms_norm=("vendor.a", "used")))
    open_.write_text(open_.read_text().replace("confirmed", "incomplete"))
    chip = str(tmp_path / "chip.yaml")
    assert main(["tune", "--merge", one, "--out", chip]) == 0
    for arguments, told in [
        (["--merge", one, other, "--out", chip], "other was measured with torch 2, another with 1"),
        (["--merge", one, one, "--out", chip], "two of the profiles have the same name"),
        (["--merge", one, str(open_), "--out", chip], "was not confirmed on fresh starts"),
        (["--merge", one, chip, "--out", one + "2"], "it is the sum of several profiles (one): give one of these"),
        (["m", "--update", chip], "it is the sum of several profiles (one)"),
        (["--merge", one, "--out", one], "--out with another file"),
        (["--merge", one], "--out with another file"),
        ([], "name the MODEL to tune"),
    ]:
        assert main(["tune", *arguments]) == 2
        assert told in capsys.readouterr().err, arguments
