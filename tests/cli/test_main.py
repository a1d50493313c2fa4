# SPDX-License-Identifier: Apache-2.0
import argparse
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sglang_fl
from sglang_fl.cli import VERBS, main
from sglang_fl.config import SettingsError

HEAVY = ("torch", "sglang", "flag_gems", "transformers", "numpy")


def exit_code(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    told = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"\n    {name} " in told or f"\n    {name}\n" in told
        assert (verb.__doc__ or "").split()[0] in told


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("demo", ("--prefer", "--tp", "--port", "--keep")),
        ("doctor", ("--deep", "--json")),
        ("ops", ("--model DIR", "--deep", "--json")),
        ("kernels", ("[word ...]", "--model DIR", "--all", "--json", "--trace")),
        ("config", ("SGLANG_FL_CONFIG",)),
        ("check", ("--op OP", "--impl ID", "--vendor NAME", "--quick", "--timeout TIME", "--seed N", "--json", "--html FILE")),
        ("bisect", ("--run CMD", "--limit TIME", "--max-runs N", "--pairs", "--out DIR", "--resume FILE", "--dry-run", "--json", "125")),
        ("tune", ("MODEL", "--traffic FILE", "--budget TIME", "--resume", "--update PROFILE", "--dry-run", "--html FILE", "--out FILE")),
        ("new-vendor", ("NAME", "DIR", "sglang-fl-NAME")),
    ],
)
def test_help_of_a_verb(capsys: pytest.CaptureFixture[str], verb: str, options: tuple[str, ...]) -> None:
    assert exit_code([verb, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: sglang-fl {verb} ")
    assert all(option in told for option in options)


def test_what_stands_behind_two_dashes_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(VERBS["tune"], "run", lambda args: given.append((args.out.name, args.server_arguments)) or 0)
    assert main(["tune", "a_model", "--out", "x.yaml", "--", "--tp", "2", "--out", "--"]) == 0
    assert main(["tune", "--out", "x.yaml", "a_model"]) == 0
    assert given == [("x.yaml", ["--tp", "2", "--out", "--"]), ("x.yaml", [])]


def test_the_table_above_has_every_verb() -> None:
    assert set(VERBS) == {"demo", "serve", "doctor", "ops", "kernels", "config", "check", "bisect", "tune", "new-vendor"}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "VERB"),
        (["docto"], "invalid choice: 'docto'"),
        (["ops", "--jsn"], "--jsn"),
        (["ops", "too-much"], "too-much"),
        (["ops", "--model"], "--model"),
        (["demo", "--prefer", "fastest"], "'fastest'"),
        (["demo", "--tp", "0"], "invalid choice: 0"),
        (["demo", "--tp", "two"], "two"),
        (["demo", "--port", "-1"], "-1"),
        (["demo", "--port", "70000"], "expected a port from 1 to 65535, found '70000'"),
        (["demo", "--port", "abc"], "expected a port from 1 to 65535, found 'abc'"),
        (["check", "--timeout", "0"], "expected a time such as 90s, 9m or 1.5h, found '0'"),
        (["check", "--timeout", "soon"], "expected a time such as 90s, 9m or 1.5h, found 'soon'"),
        (["check", "--op"], "--op"),
        (["bisect", "--limit", "soon"], "expected a time such as 90s, 9m or 1.5h, found 'soon'"),
        (["bisect", "--max-runs", "0"], "expected a number of runs above 0, found '0'"),
        (["new-vendor"], "NAME"),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert exit_code(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: sglang-fl") and told in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"sglang-fl {sglang_fl.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_is_the_verbs(monkeypatch: pytest.MonkeyPatch, verb: str, code: int) -> None:
    monkeypatch.setattr(VERBS[verb], "run", lambda args: code)
    assert main([verb, *(["a_name"] if verb in ("new-vendor", "tune") else [])]) == code


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "sglang-fl: interrupted\n"),
        (SettingsError("X: wrong"), 2, "sglang-fl: X: wrong\n"),
        (SettingsError(["X: wrong", "Y: too"]), 2, "sglang-fl: 2 settings cannot be used:\n  - X: wrong\n  - Y: too\n"),
    ],
)
def test_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, told: str) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(VERBS["ops"], "run", run)
    assert main(["ops"]) == code
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize("verb", ["config", "ops", "doctor", "check"])
def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    monkeypatch.setenv("SGLANG_FL_PREFER", "vendr")
    assert main([verb]) == (1 if verb == "doctor" else 2)
    captured = capsys.readouterr()
    assert "SGLANG_FL_PREFER: unknown value 'vendr'; did you mean 'vendor'?" in captured.out + captured.err
    assert "Traceback" not in captured.err


def test_unexpected_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(VERBS["ops"], "run", run)
    with pytest.raises(ZeroDivisionError):
        main(["ops"])


def test_installed_as_a_command() -> None:
    (script,) = entry_points(group="console_scripts", name="sglang-fl")
    assert script.load() is main


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "sglang_fl", "--version"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"sglang-fl {sglang_fl.__version__}\n")


COMMANDS = (
    ["--help"],
    ["check", "--help"],
    ["bisect", "--help"],
    ["bisect", "--run", "true", "--dry-run"],
    ["check", "--op", "rms_nrom"],
    ["config"],
    ["doctor"],
    ["doctor", "--json"],
    ["ops"],
    ["ops", "--json", "--model", "."],
)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """What takes seconds to import, or needs the device, is not needed to look at the settings."""
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    code = f"""if True:
        import contextlib, faulthandler, io, sys
        faulthandler.enable()
        from sglang_fl.cli import main
        from sglang_fl.dispatch.manager import reset_default_manager
        for argv in {COMMANDS!r}:
            reset_default_manager()
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
                assert main(argv) in (0, 1, 2)
            assert out.getvalue() or "did you mean" in err.getvalue(), argv
            print(*argv, "imported:", *[name for name in {HEAVY!r} if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{' '.join(argv)} imported:" for argv in COMMANDS]


@pytest.mark.parametrize("argv", [["config"], ["doctor", "--json"], ["ops"]], ids=" ".join)
def test_reader_of_the_output_that_goes_away(argv: list[str]) -> None:
    """As in ``sglang-fl config | head -1``: no traceback, no complaint at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "sglang_fl", *argv]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environ, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("argv", [["ops"], ["config"], ["ops", "--json"]])
def test_output_that_cannot_be_written_is_said_in_a_line(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "sglang_fl", *argv], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (1, "sglang-fl: cannot write the output: No space left on device\n")


def test_serve_becomes_the_server_with_whatever_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, command: became.append(command))
    arguments = ["--model-path", "MODEL", "--tp", "2", "--help", "-h", "--version"]
    main(["serve", *arguments])
    assert became == [[sys.executable, "-m", "sglang_fl.platform.serve", *arguments]]
