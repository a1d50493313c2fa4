# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl kernels --model DIR --trace`` on a hybrid: it serves it in the real SGLang, and finds what a chip without Triton needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .hybrid_model import hybrid_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROJECTION = "sglang.kernels.ops.attention.triton_gdn_fused_proj:fused_qkvzba_split_reshape_cat_contiguous"
REACHED = {
    PROJECTION,
    "sglang.kernels.ops.attention.linear.fused_gdn_gating:fused_gdn_gating",
    "sglang.kernels.ops.attention.fla.layernorm_gated:RMSNorm",
    "sglang.kernels.ops.elementwise.elementwise:fused_sigmoid_mul",
}


def test_what_a_hybrid_reaches(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("on a GPU other kernels are reached")
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "SGLANG_MAMBA_CONV_DTYPE": "float32"}
    command = [sys.executable, "-m", "sglang_fl", "kernels", "--json", "--model", str(hybrid_model()), "--trace", "--dtype", "float32"]
    done = subprocess.run(command, env=environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["trace"]["arguments"] == ["--dtype", "float32"]
    reached = {kernel["target"]: kernel["reached"] for kernel in found["kernels"]}
    assert reached.keys() >= REACHED
    # Two layers of linear attention, one of full attention: so often in each of the model's passes.
    passes = reached["sglang.kernels.ops.elementwise.elementwise:fused_sigmoid_mul"]
    assert reached[PROJECTION] == 2 * passes
    assert not any("causal_conv1d" in name for name in reached), "they are operators, which --all lists"
