# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: models of many classes in bf16, their layers on FlagGems's and on the vendor's kernels against SGLang's own.

Without CUDA graphs, which would be captured for each anew; models with experts have tests of their own, since in bf16 a router's
choice may turn.
"""

from collections.abc import Iterator

import pytest
import torch
from e2e.test_model_classes import MODELS, Runner, allowed_by_rounding, furthest
from served_on_gpu import FLAGOS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DENSE = [name for name, (_, layers) in MODELS.items() if "UnquantizedFusedMoEMethod" not in layers]
LEFT = {"SGLANG_FL_OOT_ENABLED": "0", "USE_FLAGGEMS": "0"}
WAYS = {"flagos": FLAGOS, "vendor": {"SGLANG_FL_PREFER": "vendor", "USE_FLAGGEMS": "0"}}
#: What a model has here and not on a CPU, whose attention has no cap, and whose configuration says so in a way that SGLang's Triton
#: attention does not take.
ONLY_HERE = {"gemma 2": {"attn_logit_softcapping": 50.0}}
#: The heads of these models are smaller than most attention backends take.
ARGUMENTS = {"dtype": "bfloat16", "disable_cuda_graph": True, "attention_backend": "triton"}
#: SGLang's class of Cohere 2 does not tell the model runner of its windows, which SGLang's Triton attention needs.
OTHER_ARGUMENTS = {"cohere 2": {"attention_backend": "torch_native"}}
#: Two implementations round each result once, and intermediate ones otherwise.
ULPS = 2


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("models")) as runner:
        yield runner


@pytest.mark.parametrize("name", DENSE)
def test_binding_changes_nothing_but_rounding(runner: Runner, name: str) -> None:
    config, expected = MODELS[name]
    config = config | ONLY_HERE.get(name, {})
    arguments = ARGUMENTS | OTHER_ARGUMENTS.get(name, {})
    _, native, others = runner.run(config, LEFT, rounded_otherwise=3, ulps=ULPS, **arguments)
    allowed = allowed_by_rounding(native, others)
    for way, environ in WAYS.items():
        bound, ours, _ = runner.run(config, environ, **arguments)
        off = furthest(ours, native)
        print(f"{name}, {way}: off by {off / allowed:.3f} of what rounding may cost ({off:.1e} of {allowed:.1e}); {bound}")
        assert any(forward not in ("forward_cuda", "forward_native") for layer in expected for forward in bound.get(layer, ()))
        assert off <= allowed
