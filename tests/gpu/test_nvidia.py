# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: the platform stays SGLang's, and bound layers serve inside its CUDA graphs."""

import pytest
import torch

from sglang_fl.dispatch import SelectionPolicy, get_default_manager, reset_global_policy, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.socket import Load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_the_platform_is_sglangs_own() -> None:
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.cuda import CudaSRTPlatform

    from sglang_fl.platform.hooks import PlatformHooks

    assert isinstance(current_platform, CudaSRTPlatform) and isinstance(current_platform, PlatformHooks)
    assert not current_platform.is_out_of_tree()
    assert current_platform.capabilities == CudaSRTPlatform.capabilities


def test_a_bound_layer_replays_in_a_graph_with_new_data() -> None:
    from sglang.srt.layers.layernorm import RMSNorm

    set_global_policy(SelectionPolicy("reference"))
    try:
        layer = RMSNorm(256).cuda().bfloat16()
        binder = Binder(get_default_manager())
        assert binder.bind(torch.nn.Sequential(layer), Load()).bound == 1
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
        binder = Binder(get_default_manager())
        assert binder.bind(torch.nn.Sequential(layer), Load()).bound == 1
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
