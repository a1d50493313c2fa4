# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings with multimodal sections: bound they compute what SGLang computes, or they are left alone."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .sglang_layers import HEAD, MAX_POSITION, ROTARY_LAYERS, rotary
from .test_bridges import CALLS, agree_with_native, bind, reference

pytestmark = pytest.mark.usefixtures("reference_policy")
SECTIONS = [8, 12, 12]


def layer_of(interleaved: bool = False, **options: Any) -> Any:
    return rotary("MRotaryEmbedding", mrope_section=[12, 10, 10] if interleaved else SECTIONS, mrope_interleaved=interleaved, **options)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", ["flat", "heads", "slices", "int32"])
def test_it_agrees_with_sglang(rng: torch.Generator, form: str, rows: int, interleaved: bool, neox: bool) -> None:
    layer = layer_of(interleaved, neox=neox)
    assert bind(layer).bound == 1
    positions = torch.randint(0, MAX_POSITION, (rows, 6), generator=rng).squeeze(0)
    query, key = torch.randn(6, 4 * HEAD, generator=rng), torch.randn(6, 2 * HEAD, generator=rng)
    if form == "heads":
        query, key = query.unflatten(1, (4, HEAD)), key.unflatten(1, (2, HEAD))
    elif form == "slices":
        query, key, _ = torch.cat([query, key, key], -1).split([4 * HEAD, 2 * HEAD, 2 * HEAD], -1)
    elif form == "int32":
        positions = positions.int()
    agree_with_native(layer, positions, query, key)
    assert CALLS == ["mrotary_embedding"]


@pytest.mark.parametrize("interleaved", [True, False])
def test_part_of_a_head(rng: torch.Generator, interleaved: bool) -> None:
    layer = layer_of(interleaved, head=128)
    bind(layer)
    positions = torch.randint(0, MAX_POSITION, (3, 5), generator=rng)
    agree_with_native(layer, positions, torch.randn(5, 256, generator=rng), torch.randn(5, 128, generator=rng))


@pytest.mark.parametrize("positions", [torch.zeros(3, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)])
@pytest.mark.parametrize("shape", [(0, 4 * HEAD), (0, 4, HEAD)])
def test_without_tokens(shape: tuple[int, ...], positions: torch.Tensor) -> None:
    layer = layer_of()
    bind(layer)
    query, key = layer(positions, torch.zeros(shape), torch.zeros(shape))
    assert query.shape == key.shape == shape


def test_without_sections(rng: torch.Generator) -> None:
    layer = rotary("MRotaryEmbedding")
    assert bind(layer).bound == 1
    query = torch.randn(3, HEAD, generator=rng)
    agree_with_native(layer, torch.arange(3), query, query)


def test_the_sections_of_glm_images_stay_with_sglang() -> None:
    layer = layer_of(True, mrope_interleaved_glm=True)
    assert "mrope_interleaved_glm" in bind(layer).summary()


def test_a_fused_kv_write_goes_to_sglang() -> None:
    layer = layer_of()
    bind(layer)
    query = torch.zeros(2, HEAD)
    with pytest.raises(AssertionError, match="save kv cache is not supported"):  # SGLang's own words
        layer(torch.arange(2), query, query, fused_set_kv_buffer_arg=object())
    assert CALLS == []


def test_it_follows_a_cache_that_is_replaced(rng: torch.Generator) -> None:
    """SGLang's own CUDA forward puts one of the activations' dtype in its place."""
    layer = layer_of()
    bind(layer)
    query = torch.randn(2, HEAD, generator=rng)
    layer(torch.arange(6).view(3, 2), query, query)
    layer.cos_sin_cache = layer.cos_sin_cache.flip(0).contiguous()
    agree_with_native(layer, torch.arange(6).view(3, 2), query, query)


def _axes_exchanged(obj: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
    return reference.mrotary_embedding(obj, positions.flip(0) if positions.dim() == 2 else positions, query, key)


def test_exchanged_axes_do_not_agree(rng: torch.Generator) -> None:
    layer = layer_of()
    assert bind(layer, mrotary_embedding=_axes_exchanged).bound == 1
    query = torch.randn(4, HEAD, generator=rng)
    with pytest.raises(AssertionError):
        agree_with_native(layer, torch.randint(0, MAX_POSITION, (3, 4), generator=rng), query, query)


class Copies(TorchDispatchMode):
    """Counts what is copied."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.copy_.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_what_was_written_in_place_is_not_copied_onto_itself(tokens: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vendor.cuda does it, which returns other views; models hand over slices of a packed projection."""

    def in_place(obj: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        rotated = reference.mrotary_embedding(obj, positions, query, key)
        for given, result in zip((query, key), rotated, strict=True):
            given.mul_(0).add_(result)
        return tuple(x.reshape(len(x), x.shape[1] // HEAD, HEAD).reshape(x.shape) for x in (query, key))

    layer = layer_of()
    monkeypatch.setattr(type(layer), "_resolve_forward_method", lambda self: self.forward_cuda)
    assert bind(layer, mrotary_embedding=in_place).bound == 1
    packed = torch.randn(tokens, 8 * HEAD, generator=rng)
    query, key, _ = packed.split([4 * HEAD, 2 * HEAD, 2 * HEAD], -1)
    positions = torch.randint(0, MAX_POSITION, (3, tokens), generator=rng)
    with Copies() as wanted:
        native = reference.mrotary_embedding(layer, positions, query.clone(), key.clone())
    with Copies() as copies:
        got = layer(positions, query, key)
    assert copies.count == wanted.count
    for given, returned, expected in zip((query, key), got, native, strict=True):
        assert returned is given
        torch.testing.assert_close(given, expected)


def test_where_sglang_writes_in_place_so_does_a_bound_layer(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ROTARY_LAYERS["MRotaryEmbedding"](dtype=torch.float32)
    monkeypatch.setattr(type(layer), "_resolve_forward_method", lambda self: self.forward_cuda)
    assert bind(layer).bound == 1
    query, key = torch.randn(4, 2 * HEAD, generator=rng), torch.randn(4, HEAD, generator=rng)
    positions = torch.randint(0, MAX_POSITION, (3, 4), generator=rng)
    wanted = layer.forward_native(positions, query.clone(), key.clone())
    got = layer(positions, query, key)
    for given, returned, native in zip((query, key), got, wanted, strict=True):
        assert returned is given
        torch.testing.assert_close(given, native)
