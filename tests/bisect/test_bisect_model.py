# SPDX-License-Identifier: Apache-2.0
"""Planted faults, found in a model that is loaded once: the demo model, in float32, on the CPU."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted_faults
import pytest
from rich.console import Console

from sglang_fl.bisect.model import ARGUMENTS, FOUND, NO_DIFFERENCE, NO_OPERATOR, Job, Report, about, bisect, bisect_loaded
from sglang_fl.bisect.page import as_html
from sglang_fl.bisect.passes import batches, read_trace, with_only
from sglang_fl.bisect.report import as_data, print_report, write_bug_reports
from sglang_fl.cli.demo_model import RECITAL, demo_model
from sglang_fl.config import Settings
from sglang_fl.model_run import CallFailed, Crashed, LoadedModel, ModelRun

pytestmark = pytest.mark.e2e

JOB = Job("demo", Settings(), prompts=(RECITAL[:84], RECITAL[84:180]))
#: Beside other processes PyTorch's threads would wait for each other.
ENVIRON = {**planted_faults.ENVIRON, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    with LoadedModel(str(demo_model()), [*ARGUMENTS, "--dtype", "float32"], ENVIRON) as model:
        yield model


def found_with(loaded: LoadedModel, fault: str, archives: Path | None = None) -> Report:
    loaded.call(planted_faults.plant, fault)
    try:
        return bisect_loaded(loaded, replace(JOB, archives=archives), lambda line: None)
    finally:
        loaded.call(planted_faults.plant, "")


def assert_few_trials(report: Report) -> None:
    """Beside these there are two that measure the effect of rounding: at most 12 in all."""
    assert len(report.trials) <= 10


def test_right_implementations_are_not_accused(loaded: LoadedModel) -> None:
    report = found_with(loaded, "")
    assert report.verdict == NO_DIFFERENCE
    assert not [finding for finding in report.findings if finding.problem is not None]
    assert {finding.phase for finding in report.findings} == {"prefill", "decode"}
    assert {finding.batch for finding in report.findings} == {"one", "batch of 12", "long"}


@pytest.mark.parametrize("seed", range(5))
def test_kernels_that_round_otherwise_are_not_accused(loaded: LoadedModel, seed: int) -> None:
    """benchmarks/bisect_shams.py does it 100 times."""
    report = found_with(loaded, f"rounds otherwise {seed}")
    assert (report.verdict, report.culprits) == (NO_DIFFERENCE, ()), report.message


@pytest.mark.parametrize(
    "fault, culprit, place",
    [
        ("one layer", "RMSNorm → vendor.planted", "model.layers.1.post_attention_layernorm, one, prefill"),
        ("decode only", "SiluAndMul → vendor.planted", "model.layers.0.mlp.act_fn, one, decode"),
        ("batch > 8 only", "RMSNorm → vendor.planted", "model.layers.0.input_layernorm, batch of 12, decode"),
        ("one gather", "index (FlagGems, index.Tensor)", "index.Tensor, one, prefill"),
        ("adds up", "RMSNorm → vendor.planted", "model.layers.0.input_layernorm, one, prefill"),
        ("adds up over a context", "RotaryEmbedding → vendor.planted", ", long, prefill"),
        ("writes an input", "RMSNorm → vendor.planted", "wrote x, which it may not"),
        ("state is kept", "SiluAndMul → vendor.planted", "mlp.act_fn, one, prefill"),
    ],
)
def test_a_fault_is_named_with_its_layer_and_call(loaded: LoadedModel, fault: str, culprit: str, place: str) -> None:
    report = found_with(loaded, fault)
    assert (report.verdict, [str(one) for one in report.culprits]) == (FOUND, [culprit]), report.message
    assert place in report.message
    assert "the output changes with only this on, and is right with only this off" in report.message
    assert_few_trials(report)


def test_two_that_are_harmless_alone_are_found_together(loaded: LoadedModel) -> None:
    report = found_with(loaded, "harmless alone")
    assert report.verdict == FOUND and report.together, report.message
    assert_few_trials(report)
    assert {one.name for one in report.culprits} == {"RMSNorm", "SiluAndMul"}
    assert "Each single call is right on SGLang's own inputs." in report.message


def test_two_unrelated_faults_are_both_named(loaded: LoadedModel) -> None:
    report = found_with(loaded, "two of unequal size")
    assert (report.verdict, report.together) == (FOUND, False), report.message
    assert_few_trials(report)
    assert {one.name for one in report.culprits} == {"RMSNorm", "SiluAndMul"}
    assert "each of them changes the output alone; with all of them off it is right. RMSNorm is wrong first in call 0 of" in report.message


def test_a_fault_of_sglangs_own_is_no_operator(loaded: LoadedModel) -> None:
    report = found_with(loaded, "SGLang's own")
    assert report.verdict == NO_OPERATOR and not report.culprits, report.message
    assert "SGLang's own RMSNorm is wrong" in report.message


def test_the_report_and_the_archive_show_the_fault_without_us(loaded: LoadedModel, tmp_path: Path) -> None:
    report = found_with(loaded, "one gather", tmp_path)
    text = io.StringIO()
    print_report(report, Console(file=text, width=200, markup=False))
    assert "FOUND: index (FlagGems, index.Tensor): the output changes with only this on" in text.getvalue()
    assert "flagos_blacklist: [index]" in text.getvalue()
    data = json.loads(json.dumps(as_data(report)))
    assert (data["verdict"], data["setting"]) == ("found", "flagos_blacklist: [index]")
    assert {row["phase"] for row in data["findings"] if row["problem"]} >= {"prefill"}
    assert data["suspicion"]["aten:index"] == 50.0 and data["suspicion"]["op:rms_norm"] < 10.0
    page = as_html(report)
    assert page.count("<svg") == len({str(one.replacement) for one in report.findings}) and "flagos_blacklist: [index]" in page
    assert 'class="wrong"' in page and 'class="native"' in page and "http" not in page
    (file,) = report.archives
    write_bug_reports(report, "sglang-fl bisect demo")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    told = (tmp_path / "report.txt").read_text()
    for words in (
        "- torch ",
        "are out of bounds",
        "- device: cpu",
        "Inputs: 0: torch.float32 (",
        "changes\n",
        "FOUND: index",
        "Command: sglang-fl",
    ):
        assert words in told, told
    environ = {**os.environ, **planted_faults.ENVIRON, "PLANTED_FAULT": "one gather"}
    without_sglang = "import runpy, sys; sys.modules['sglang'] = None; runpy.run_path('repeat.py')"
    command = [sys.executable, "-c", without_sglang]
    found = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    assert found.stdout.startswith("result 0: 128 of"), found.stdout
    script = (tmp_path / "repeat.py").read_text().rpartition('"""')[2].strip()
    assert len(script.splitlines()) <= 10 and "sglang" not in script


@pytest.mark.parametrize(
    "prompts, tokens, message",
    [
        (["word " * 3000], True, "tokens; at most 2042 fit here"),
        ([""], True, "the prompt '' has no tokens"),
        (["5 6 512"], False, "the prompt '5 6 512' is not a list of token ids below 512"),
        (["Sonnet 18"], False, "the prompt 'Sonnet 18' is not a list of token ids below 512"),
    ],
)
def test_a_prompt_that_cannot_be_run(loaded: LoadedModel, prompts: list[str], tokens: bool, message: str) -> None:
    with pytest.raises(CallFailed) as error:
        loaded.call(batches_of, prompts, tokens)
    assert message in str(error.value)


def test_a_prompt_of_token_ids(loaded: LoadedModel) -> None:
    (found,) = loaded.call(batches_of, ["5, 6 7,8"], False)
    assert found[0].sequences[0][:4] == (5, 6, 7, 8)


def test_a_batch_is_as_large_as_the_servers_arguments_allow(loaded: LoadedModel) -> None:
    (found,) = loaded.call(batches_of_four)
    assert [(batch.name, len(batch.sequences)) for batch in found] == [("one", 1), ("batch of 4", 4), ("long", 1)]


def batches_of_four(run: ModelRun) -> Any:
    own = run.runner.max_running_requests
    try:
        run.runner.max_running_requests = 4
        return batches(run, list(JOB.prompts))
    finally:
        run.runner.max_running_requests = own


def batches_of(run: ModelRun, prompts: list[str], tokens: bool) -> Any:
    own = run.tokenizer
    try:
        run.tokenizer = own if tokens else None
        return batches(run, prompts)
    finally:
        run.tokenizer = own


def test_what_raised_an_error_is_known(loaded: LoadedModel, tmp_path: Path) -> None:
    _, _, given = loaded.call(about, list(JOB.prompts))[0]
    loaded.call(with_only, given[:1], None, str(tmp_path))
    assert read_trace(tmp_path) is None
    loaded.call(planted_faults.plant, "raises")
    try:
        with pytest.raises(CallFailed, match="device queue full"):
            loaded.call(with_only, given, None, str(tmp_path))
    finally:
        loaded.call(planted_faults.plant, "")
    assert read_trace(tmp_path) == ("silu (FlagGems, silu)", "aten::silu, one, decode")


def test_what_runs_when_a_process_ends_is_known(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.call(planted_faults.plant, "crash")
    _, _, given = loaded.call(about, list(JOB.prompts))[0]
    with pytest.raises(Crashed, match=r"SIGSEGV"):
        loaded.call(with_only, given, None, str(tmp_path))
    assert read_trace(tmp_path) == ("silu (FlagGems, silu)", "aten::silu, one, decode")


@pytest.mark.slow
@pytest.mark.parametrize("fault, how", [("crash", "crashes"), ("hang", "hangs"), ("raises", "raises an error")])
def test_what_ends_the_process_is_proven_in_new_ones(fault: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRON, "PLANTED_FAULT": fault}.items():
        monkeypatch.setenv(name, value)
    job = replace(JOB, model=str(demo_model()), arguments=("--dtype", "float32"), limit=60.0)
    report = bisect(job, lambda line: None)
    assert (report.verdict, [one.name for one in report.culprits], report.loads) == (FOUND, ["silu"], 3), report.message
    assert [(trial.effect, trial.reproduces) for trial in report.trials] == [(None, True), (None, False)]
    assert as_data(report)["setting"] == "flagos_blacklist: [silu]"
    assert f"silu (FlagGems, silu) {how} in aten::silu, one, decode" in report.message


@pytest.mark.slow
def test_a_fault_of_one_rank_is_named_with_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRON, "PLANTED_FAULT": "one rank"}.items():
        monkeypatch.setenv(name, value)
    report = bisect(replace(JOB, model=str(demo_model()), arguments=("--dtype", "float32", "--tp", "2")), lambda line: None)
    assert (report.verdict, [one.name for one in report.culprits]) == (FOUND, ["RMSNorm"]), report.message
    assert "only on rank 1" in report.message
