# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: the platform stays SGLang's, and bound layers serve inside its CUDA graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import DTYPES, Norm, check_rms_norm, check_rotary_embedding, check_silu_and_mul
from e2e.conftest import Prompt, make_prompts, off_by, serving

from sglang_fl.cli.demo_model import RECITAL, demo_model
from sglang_fl.config import Settings
from sglang_fl.dispatch import SelectionPolicy, get_default_manager, reset_global_policy, set_global_policy
from sglang_fl.dispatch.backends.reference.reference import ReferenceBackend
from sglang_fl.dispatch.bridge.binder import Binder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

reference = ReferenceBackend()


def on_gpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of CPU tensors that computes on the GPU: what it is compared with stays on the CPU."""

    def there(x: Any) -> Any:
        return x.cuda() if isinstance(x, torch.Tensor) else Norm(x.weight.cuda(), x.variance_epsilon) if isinstance(x, Norm) else x

    def call(*args: Any) -> Any:
        result = fn(*map(there, args))
        return tuple(y.cpu() for y in result) if isinstance(result, tuple) else result.cpu()

    return call


def test_the_platform_is_sglangs_own() -> None:
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.cuda import CudaSRTPlatform

    from sglang_fl.platform import FLMoments

    assert isinstance(current_platform, CudaSRTPlatform) and isinstance(current_platform, FLMoments)
    assert not current_platform.is_out_of_tree()
    assert current_platform.capabilities == CudaSRTPlatform.capabilities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (0, 64), (33, 80), (4, 7, 512), (2048, 4096)])
def test_reference_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    check_rms_norm(on_gpu(reference.rms_norm), Norm(torch.randn(shape[-1])), x, None)
    check_rms_norm(on_gpu(reference.rms_norm), Norm(torch.randn(shape[-1])), x, residual)
    check_silu_and_mul(on_gpu(reference.silu_and_mul), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 64), (80, 80)])
def test_reference_rotary_against_float64(head_dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    angles = torch.rand(4096, rotary_dim // 2) * 6.3
    query, key = torch.randn(129, 8, head_dim).to(dtype), torch.randn(129, 2, head_dim).to(dtype)
    case = query, key, angles.cos(), angles.sin(), torch.randint(0, 4096, (129,))
    check_rotary_embedding(on_gpu(reference.rotary_embedding), *case, interleaved)


def test_a_bound_layer_replays_in_a_graph_with_new_data() -> None:
    from sglang.srt.layers.layernorm import RMSNorm

    set_global_policy(SelectionPolicy("reference"))
    try:
        layer = RMSNorm(256).cuda().bfloat16()
        binder = Binder(get_default_manager(), Settings())
        assert binder.bind(torch.nn.Sequential(layer)).bound == 1
        x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn(8, 256))
        graph.replay()
        assert torch.equal(y, layer(x))
    finally:
        reset_global_policy()


@pytest.mark.parametrize("form", ["flat", "heads", "slices"])
def test_a_rotary_embedding_is_written_in_place_as_sglangs_own_is(form: str) -> None:
    """models/llama4.py rotates views of its packed queries and keys, and goes on with the packed tensor."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    set_global_policy(SelectionPolicy("reference"))
    try:
        layer, own = (RotaryEmbedding(64, 64, 256, 10000, True, torch.bfloat16).cuda() for _ in range(2))
        binder = Binder(get_default_manager(), Settings())
        assert binder.bind(torch.nn.Sequential(layer)).bound == 1
        packed = torch.randn(5, 6 * 64, device="cuda", dtype=torch.bfloat16)
        positions = torch.randint(0, 256, (5,), device="cuda")
        results = []
        for rotary in (layer, own):
            query, key = packed.clone().split([4 * 64, 2 * 64], -1)
            if form != "slices":
                query, key = query.contiguous(), key.contiguous()
            if form == "heads":
                query, key = query.unflatten(1, (4, 64)), key.unflatten(1, (2, 64))
            rotary(positions, query, key)
            results.append((query, key))
        for ours, theirs in zip(*results, strict=True):
            assert (ours.double() - theirs.double()).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * ours.double().abs().max()
            assert not torch.equal(theirs.flatten(1), packed[:, : theirs.flatten(1).shape[1]])
    finally:
        reset_global_policy()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(demo_model(), torch.bfloat16)


@pytest.mark.parametrize(
    ("prefer", "destination"),
    [(None, "sglang(policy)"), ("reference", "reference(reference.torch)")],
)
def test_serving_with_sglangs_default_graphs(prefer: str | None, destination: str, prompts: list[Prompt], tmp_path: Path) -> None:
    environ = {"SGLANG_FL_PREFER": prefer} if prefer else {}
    with serving(demo_model(), tmp_path, dtype="bfloat16", environ=environ) as running:
        assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
        worst = max(off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) for prompt in prompts)
        print(f"logprobs are off by {worst:.3f} of what rounding to bf16 may cost")
        assert worst <= 0.5
        assert running.dispatched() == {f"{name} → {destination}" for name in ("RMSNorm", "SiluAndMul", "RotaryEmbedding")}
        printed = running.server.log.read_text()
        assert "Capture" in printed or "capture" in printed
