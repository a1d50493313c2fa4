# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: faults planted among FlagGems's own functions, and one that is only in graphs, found in the demo model."""

import time
from collections.abc import Iterator

import planted_faults
import pytest
import torch
from served_on_gpu import FLAGOS

from sglang_fl.bisect.model import ARGUMENTS, FOUND, NO_DIFFERENCE, Job, Report, bisect_loaded
from sglang_fl.cli.demo_model import RECITAL, demo_model
from sglang_fl.config import Settings
from sglang_fl.model_run import LoadedModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ENVIRON = {
    **{name: planted_faults.ENVIRON[name] for name in ("SGLANG_FL_PLUGIN_MODULES", "PYTHONPATH")},
    **FLAGOS,
    "SGLANG_FL_FLAGOS_SCOPE": "everywhere",
    "SGLANG_FL_PER_OP": "silu_and_mul=vendor:planted;rms_norm=vendor:planted",
}


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    with LoadedModel(str(demo_model()), [*ARGUMENTS, "--dtype", "bfloat16", "--mem-fraction-static", "0.5"], ENVIRON) as model:
        yield model


def found_with(loaded: LoadedModel, fault: str) -> Report:
    loaded.call(planted_faults.plant, fault)
    begun = time.monotonic()
    report = bisect_loaded(loaded, Job("demo", Settings(), prompts=(RECITAL[:84],)), lambda line: None)
    print(f"{fault or 'nothing planted'}: {time.monotonic() - begun:.0f} s, {len(report.trials)} trials: {report.message}")
    return report


def test_what_is_right_is_not_accused(loaded: LoadedModel) -> None:
    report = found_with(loaded, "")
    assert (report.verdict, report.culprits) == (NO_DIFFERENCE, ())
    assert report.facts["graphs"] == "prefill, decode"
    assert report.in_graphs is not None, report.message


@pytest.mark.parametrize(
    "fault, culprit, place",
    [
        ("one gather", "index", "index.Tensor, batch of 12, prefill"),
        ("batch > 8 only", "RMSNorm", "model.layers.0.input_layernorm"),
        ("stale pointer", "SiluAndMul", "Only in graphs: SiluAndMul"),
    ],
)
def test_what_is_planted_is_found(loaded: LoadedModel, fault: str, culprit: str, place: str) -> None:
    report = found_with(loaded, fault)
    assert (report.verdict, [one.name for one in report.culprits]) == (FOUND, [culprit])
    assert place in report.message and len(report.trials) <= 10
