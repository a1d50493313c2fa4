# SPDX-License-Identifier: Apache-2.0
"""sglang-fl tune through the real engine, with a package whose implementations are one of each kind, and the profile that comes out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import planted_choices
import pytest
import torch

from sglang_fl.config import load_settings
from sglang_fl.fingerprint.measured import measured_in
from sglang_fl.tune import profile, served
from sglang_fl.tune.baseline import Baseline
from sglang_fl.tune.bench import NATIVE, Bench
from sglang_fl.tune.journal import Journal
from sglang_fl.tune.judge import CRASHED, NOT_BEST, SLOWER, SLOWER_SERVED, TIE, USED, WRONG, Candidate
from sglang_fl.tune.outcome import Outcome
from sglang_fl.tune.served import Lengths
from sglang_fl.tune.tuning import Job, Tuning

pytestmark = pytest.mark.e2e

LAYERS = 2
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 512,
}
SERVER = ("--load-format", "dummy", "--dtype", "float32", "--skip-tokenizer-init", "--max-total-tokens", "2048", "--random-seed", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.accelerator.is_available():
        pytest.skip("these tests are for a plain CPU")
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def environ() -> dict[str, str]:
    """Of a process that has the planted implementations, and no others' candidates but theirs."""
    tests = str(Path(planted_choices.__file__).parent)
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    planted = {"SGLANG_FL_PLUGIN_MODULES": "planted_choices", "SGLANG_FL_OOT_WHITELIST": "SiluAndMul"}
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **planted}


def tuned(model: Path, directory: Path, *options: str) -> Outcome:
    """All steps but the fresh starts, in one engine."""
    journal = Journal(directory / "journal.jsonl", {}, resume=False)
    lengths = Lengths(prefill=8, decode=4, output=4)
    traffic = directory / "requests.jsonl"
    traffic.write_text('{"input_len": 8, "output_len": 2}\n')
    with pytest.MonkeyPatch.context() as patch, Bench(["--model-path", str(model), *SERVER, *options], directory, lengths, [1]) as bench:
        patch.setattr(served, "FIRST_TOKENS", 2)
        for name, value in environ().items():
            patch.setenv(name, value)
        tuning = Tuning(Job(directory, traffic=traffic), bench, journal, print, lambda path, outcome: None)
        tuning.measure()
        assert bench.starts == 1
    journal.close()
    return tuning.outcome


@pytest.fixture(scope="module")
def outcome(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return tuned(model, tmp_path_factory.mktemp("tune"))


def candidate(outcome: Outcome, kind: str) -> Candidate:
    (found,) = (one for one in outcome.candidates if one.impl == f"vendor.{kind}")
    return found


def test_each_kind_is_told_from_the_others(outcome: Outcome) -> None:
    status = {kind: candidate(outcome, kind).status for kind in planted_choices.KINDS}
    assert status.pop("a_tie") in (TIE, SLOWER)
    assert status == {
        "right_and_faster": USED,
        "right_and_slower": SLOWER,
        "faster_and_wrong": WRONG,
        "slower_served": SLOWER_SERVED,
        "not_deterministic": WRONG,
        "capture_unsafe": WRONG,
        "crashing": CRASHED,
    }
    (reference,) = (one for one in outcome.candidates if one.impl == "reference.torch")
    assert reference.status == NOT_BEST and "vendor.right_and_faster saves more" in reference.reason
    functions = {one.name: one for one in outcome.candidates if one.impl is None}
    assert functions["silu"].status == WRONG
    assert functions["rsqrt"].status == SLOWER_SERVED and "% of a step of decode/1" in functions["rsqrt"].reason


def test_calls_are_counted_by_the_step(outcome: Outcome) -> None:
    (call,) = (call for call in candidate(outcome, "right_and_faster").calls if call["call"] == "1x512 float32")
    assert call["per_pass"]["decode/1"] == LAYERS
    assert candidate(outcome, "right_and_faster").gains["decode/1"] > 0.5 * LAYERS * 1e6 * planted_choices.PAUSE


def test_the_profile_has_the_reason_and_the_figure_of_each(outcome: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    profile.write(path, outcome, Baseline())
    settings = load_settings({"SGLANG_FL_CONFIG": str(path)})
    assert dict(settings.op_backends)["silu_and_mul"] == ("impl:vendor.right_and_faster", "sglang")
    assert "silu" in (settings.flagos_broken or ())
    entry = (measured_in(path) or {})["entries"]["silu_and_mul"]
    assert entry["impl"] == "vendor.right_and_faster" and "planted_choices" in entry["packages"]
    found = entry["candidates"]
    assert "of native's speed in" in found["vendor.slower_served"]["reason"] and found["vendor.slower_served"]["served"]
    assert "not deterministic" in found["vendor.not_deterministic"]["reason"]
    assert all(one["reason"] for one in found.values())


@pytest.mark.slow  # an engine of two ranks
def test_two_ranks_are_measured_with_their_halves_of_a_layer(model: Path, tmp_path: Path) -> None:
    found = tuned(model, tmp_path, "--tp", "2")
    assert found.about["conditions"]["tp"] == 2 and dict(found.used.impls) == {"silu_and_mul": "vendor.right_and_faster"}
    assert "1x256 float32" in {call["call"] for call in candidate(found, "right_and_faster").calls}


def command(model: Path, out: Path, *options: str) -> list[str]:
    lengths = ("--batch", "1", "--input-len", "16", "--output-len", "8")
    return [sys.executable, "-m", "sglang_fl", "tune", str(model), "--out", str(out), *options, *lengths, "--", *SERVER]


@pytest.mark.slow  # six engines
def test_a_run_that_is_killed_goes_on_and_is_confirmed_on_fresh_starts(model: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "profile.yaml", tmp_path / "profile.tune" / "journal.jsonl"
    given = {**os.environ, **environ()}
    with subprocess.Popen(command(model, out), start_new_session=True, env=given) as killed:
        deadline = time.monotonic() + 600
        while not (journal.exists() and b'"kind": "check"' in journal.read_bytes()):
            assert time.monotonic() < deadline and killed.poll() is None
            time.sleep(0.2)
        os.killpg(killed.pid, signal.SIGKILL)
    before = journal.read_bytes()
    subprocess.run(command(model, out, "--resume", "--html", str(tmp_path / "page.html")), check=True, timeout=2400, env=given)
    assert journal.with_name("finished.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    measured = measured_in(out) or {}
    assert measured["confirmed"]["decode/1"] > 1 and measured["entries"]["silu_and_mul"]["impl"] == "vendor.right_and_faster"
    assert "<svg" in (tmp_path / "page.html").read_text()


@pytest.mark.slow  # five engines
def test_only_what_a_change_touches_is_measured_again(model: Path, outcome: Outcome, tmp_path: Path) -> None:
    out, again = tmp_path / "profile.yaml", tmp_path / "again.yaml"
    profile.write(out, outcome, Baseline())
    measured = measured_in(out) or {}
    now = measured["with"]["sources"]["planted_choices"]
    out.write_text(out.read_text().replace(now, "another"))
    given = {**os.environ, **environ()}
    update = subprocess.run(command(model, again, "--update", str(out)), timeout=2400, capture_output=True, text=True, env=given)
    assert update.returncode == 0, update.stdout + update.stderr
    assert f"the source of planted_choices was another and is {now}: silu_and_mul" in update.stdout
    lines = again.with_suffix(".update").joinpath("finished.jsonl").read_text().splitlines()
    tried = {line["key"].split(": ")[1] for line in map(json.loads, lines[1:]) if line["kind"] in ("check", "time")}
    found = measured_in(again) or {}
    assert tried == {"silu_and_mul"} and found["with"] == measured["with"]
    assert found["entries"].pop("silu_and_mul")["impl"] == "vendor.right_and_faster"
    assert measured["entries"].pop("silu_and_mul") and found["entries"] == measured["entries"]


def test_a_choice_is_what_an_engine_starts_with() -> None:
    assert NATIVE.environ()["USE_FLAGGEMS"] == "0" and "rms_norm=sglang" in NATIVE.environ()["SGLANG_FL_PER_OP"]
