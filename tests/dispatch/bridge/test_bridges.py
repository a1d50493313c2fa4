# SPDX-License-Identifier: Apache-2.0
"""Every SGLang class that a bridge is for: bound it computes what SGLang computes, or it is left alone."""

import ast
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import sglang
import torch
from accuracy import U32, assert_within
from backend_functions import reference
from implementations import manager_of
from torch import nn

from sglang_fl.config import Settings
from sglang_fl.dispatch import (
    BackendImplKind,
    OpImpl,
    Refusal,
    SelectionPolicy,
    set_global_policy,
)
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.report import BindReport
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.catalog import CUSTOM_FORWARD, LAYERS, STANDALONE_CLASSES
from sglang_fl.dispatch.logger_manager import open_dispatch_log

from .sglang_layers import (
    ACTIVATION_LAYERS,
    HEAD,
    HIDDEN,
    MAX_POSITION,
    MOE_LAYERS,
    NORM_LAYERS,
    ROTARY_LAYERS,
    Model,
    rotary,
    sglang_class,
)

CALLS: list[str] = []
pytestmark = pytest.mark.usefixtures("reference_policy")


def counted(op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS.append(op)
        return fn(*args, **kwargs)

    return call


def counted_reference(op: str, fn: Callable[..., Any] | None = None, **more: Any) -> OpImpl:
    """The reference, or a function in its place."""
    return OpImpl(op, "reference.torch", BackendImplKind.REFERENCE, counted(op, fn or getattr(reference, op)), **more)


def bind(
    *layers: nn.Module, dtype: torch.dtype = torch.float32, settings: Settings | None = None, **wrong: Callable[..., Any]
) -> BindReport:
    """Bind layers to the reference, or to a function given for an operator; the calls of the trial are not counted."""
    binder = Binder(manager_of(*(counted_reference(op, wrong.get(op)) for op in LAYERS)))
    for layer in layers:
        layer.test_keeps_alive = binder  # type: ignore[assignment]
    report = binder.bind(Model(*layers, dtype=dtype), Load(settings or Settings()))
    CALLS.clear()
    return report


def sglang_subclasses() -> dict[str, set[str]]:
    """operator -> its classes and all their subclasses, read from the source of the installed SGLang."""
    roots = {op: {layers[0][1]} | {name for _, name in layers if name in STANDALONE_CLASSES} for op, layers in LAYERS.items()}
    parents: dict[str, set[str]] = {}
    bases = "|".join(frozenset().union(*roots.values()))
    any_of_them = re.compile(rf"^class (?:\w+\(.*(?:{bases})|(?:{bases})\b)", re.MULTILINE)
    for path in (Path(sglang.__file__).parent / "srt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any_of_them.search(text) is None:
            continue  # the rest takes ten seconds to parse
        tree = ast.parse(text)
        foreign = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not (node.level or (node.module or "").startswith("sglang"))
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = {base.id for base in node.bases if isinstance(base, ast.Name)} - foreign
                parents.setdefault(node.name, set()).update(names)
    found = {}
    for op, family in roots.items():
        while grown := {name for name, above in parents.items() if above & family} - family:
            family |= grown
        found[op] = family
    # A class that another operator's class derives from is that operator's, with all below it.
    for op, family in found.items():
        for nearer, (base, *_) in LAYERS.items():
            if nearer != op and base[1] in family:
                found[op] = found[op] - found[nearer]
    return found


def test_catalog_names_every_subclass_of_the_installed_sglang() -> None:
    assert {op: {name for _, name in layers} for op, layers in LAYERS.items()} == sglang_subclasses()


def test_every_class_of_the_catalog_is_walked_here() -> None:
    walked = ROTARY_LAYERS.keys() | NORM_LAYERS.keys() | ACTIVATION_LAYERS.keys() | MOE_LAYERS.keys()
    assert walked == {name for layers in LAYERS.values() for _, name in layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTARY_LAYERS)
def test_rotary_class(rng: torch.Generator, name: str, dtype: torch.dtype) -> None:
    layer = ROTARY_LAYERS[name](dtype=dtype)
    report = bind(layer, dtype=dtype)
    if name in CUSTOM_FORWARD:
        assert report.bound == 0 and layer._forward_method is None, report.summary()
        assert "overrides" in report.summary()
        return
    assert report.bound == 1, report.summary()
    positions = torch.randint(0, MAX_POSITION, (7,), generator=rng)
    query, key = torch.randn(7, 3 * HEAD, generator=rng).to(dtype), torch.randn(7, 2 * HEAD, generator=rng).to(dtype)
    agree_with_native(layer, positions, query, key)
    assert ["mrotary_embedding" if name in {known for _, known in LAYERS["mrotary_embedding"]} else "rotary_embedding"] == CALLS


def agree_with_native(layer: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *more: Any) -> None:
    """Native rounds each product and the sum in the activation's dtype; the reference rounds once."""
    got = layer(positions, query.clone(), key.clone(), *more)
    native = layer.forward_native(positions, query.clone(), key.clone(), *more)
    for name, x, a, b in zip(("query", "key"), (query, key), got, native, strict=True):
        assert a.shape == b.shape == x.shape and a.dtype == b.dtype == x.dtype
        terms = x.double().abs().max().expand(x.shape) * 2
        roundings = 4 * max(1.0, torch.finfo(x.dtype).eps / 2 / U32)
        assert_within(name, a, b.double(), terms, roundings)


def test_fused_kv_write_goes_to_sglang() -> None:
    layer = ROTARY_LAYERS["RotaryEmbedding"](dtype=torch.float32)
    bind(layer)
    q = torch.zeros(2, HEAD)
    with pytest.raises(AssertionError, match="fused_set_kv_buffer_arg"):  # SGLang's own words on a CPU
        layer(torch.tensor([0, 1]), q, q, fused_set_kv_buffer_arg=object())
    assert CALLS == []


def test_a_replaced_forward_is_left() -> None:
    layer: Any = NORM_LAYERS["RMSNorm"]()
    layer.forward = lambda x: x
    assert "its forward was replaced" in bind(layer).summary()


def test_a_subclass_of_tomorrow_is_left() -> None:
    class Tomorrow(sglang_class("RMSNorm")):  # type: ignore[misc]
        def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert "Tomorrow overrides forward_cuda" in bind(Tomorrow(HIDDEN)).summary()


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("head", "rotary_dim"), [(64, 64), (128, 64), (80, 80), (96, 24)])
@pytest.mark.parametrize("form", ["flat", "heads", "slices", "batch", "offsets", "int32"])
def test_rotary_shapes(rng: torch.Generator, form: str, head: int, rotary_dim: int, neox: bool) -> None:
    layer = rotary("RotaryEmbedding", head=head, rotary_dim=rotary_dim, neox=neox)
    bind(layer)
    positions = torch.randint(0, MAX_POSITION // 2, (6,), generator=rng)
    query, key = torch.randn(6, 4 * head, generator=rng), torch.randn(6, 2 * head, generator=rng)
    more: tuple[Any, ...] = ()
    if form == "heads":
        query, key = query.unflatten(1, (4, head)), key.unflatten(1, (2, head))
    elif form == "slices":
        query, key, _ = torch.cat([query, key, key], -1).split([4 * head, 2 * head, 2 * head], -1)
    elif form == "batch":
        positions, query, key = positions.view(2, 3), query.view(2, 3, -1), key.view(2, 3, -1)
    elif form == "offsets":
        more = (torch.randint(0, MAX_POSITION // 2, (6,), generator=rng),)
    elif form == "int32":
        positions = positions.int()
    agree_with_native(layer, positions, query, key, *more)
    assert CALLS == ["rotary_embedding"]


class InPlaceRotary(sglang_class("RotaryEmbedding")):  # type: ignore[misc]
    """As on a device where SGLang's own kernel writes query and key, and models rely on it."""

    def _resolve_forward_method(self) -> Callable[..., Any]:
        return self.forward_cuda


@pytest.mark.parametrize("form", ["flat", "heads", "slices"])
@pytest.mark.parametrize("writes", [False, True])
def test_callers_that_do_not_look_at_the_result(rng: torch.Generator, form: str, writes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """models/llama4.py rotates views of its packed queries and keys, and goes on with the packed tensor."""
    monkeypatch.setattr("sglang_fl.dispatch.bridge.layer.overridden", lambda cls, base: set())

    def writing(obj: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any) -> Any:
        rotated = reference.rotary_embedding(obj, query, key, *rest)
        return query.copy_(rotated[0]), key.copy_(rotated[1])

    layer = InPlaceRotary(HEAD, HEAD, MAX_POSITION, 10000, True, torch.float32)
    assert bind(layer, rotary_embedding=writing if writes else reference.rotary_embedding).bound == 1
    packed = torch.randn(5, 6 * HEAD, generator=rng)
    query, key = (
        packed.clone().split([4 * HEAD, 2 * HEAD], -1)
        if form == "slices"
        else (packed[:, : 4 * HEAD].clone(), packed[:, 4 * HEAD :].clone())
    )
    if form == "heads":
        query, key = query.unflatten(1, (4, HEAD)), key.unflatten(1, (2, HEAD))
    positions = torch.randint(0, MAX_POSITION, (5,), generator=rng)
    expected = layer.forward_native(positions, query.clone(), key.clone())
    result = layer(positions, query, key)
    for given, returned, native in zip((query, key), result, expected, strict=True):
        assert returned is given
        assert_within("rotary_embedding", given, native.double(), native.double().abs() + 1, roundings=8)


def test_where_sglang_is_out_of_place_nothing_is_written(rng: torch.Generator) -> None:
    """layers/attention/dsa/dsa_indexer.py gives one tensor as query and key, except on devices where SGLang's own is in place."""

    def one_after_the_other(obj: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any) -> Any:
        *rest, inplace = rest
        rotated = []
        for x in (query, key):
            rotated.append(reference.rotary_embedding(obj, x, x, *rest, False)[0])
            if inplace:
                rotated[-1] = x.copy_(rotated[-1])
        return tuple(rotated)

    layer = rotary("RotaryEmbedding")
    assert bind(layer, rotary_embedding=one_after_the_other).bound == 1
    key, positions = torch.randn(3, 1, HEAD, generator=rng), torch.tensor([3, 5, 7])
    native = layer.forward_native(positions, key.clone(), key.clone())
    given = key.clone()
    for one, other in zip(layer(positions, given, given), native, strict=True):
        assert_within("rotary_embedding", one, other.double(), other.double().abs() + 1, roundings=8)
    assert torch.equal(given, key)


def test_the_log_says_where_calls_went_that_the_operator_cannot_express(
    rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA several models have the kernel of their rotary embedding write the KV cache too."""
    log = tmp_path / "dispatch.log"
    open_dispatch_log(str(log))
    try:
        layer = rotary("RotaryEmbedding")
        monkeypatch.setattr(type(layer), "forward_native", lambda self, positions, query, key, offsets, fused: (query, key))
        assert bind(layer).bound == 1
        query, key, positions = torch.randn(2, HEAD, generator=rng), torch.randn(2, HEAD, generator=rng), torch.arange(2)
        for _ in range(3):
            layer(positions, query, key, fused_set_kv_buffer_arg=object())
        assert log.read_text() == "[OOT-DISPATCH] RotaryEmbedding → sglang(arguments not supported by reference(reference.torch))\n"
        assert CALLS == []
        layer(positions, query, key)
        assert "[OOT-DISPATCH] RotaryEmbedding → reference(reference.torch)\n" in log.read_text()
        assert CALLS == ["rotary_embedding"]
    finally:
        open_dispatch_log(None)


def test_after_a_refusal_the_next_takes_the_call(rng: torch.Generator) -> None:
    """SGLang may round a layer's cos and sin to bf16 while it serves (models/mimo_v2.py), which vendor.cuda's kernel cannot read."""

    def only_fp32(obj: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, *rest: Any) -> Any:
        CALLS.append("vendor")
        if cos.dtype != torch.float32:
            raise Refusal(f"cos in {cos.dtype}")
        return reference.rotary_embedding(obj, query, key, cos, *rest)

    vendors = OpImpl("rotary_embedding", "vendor.x", BackendImplKind.VENDOR, only_fp32, vendor="nvidia")
    set_global_policy(SelectionPolicy("vendor"))
    layer = rotary("RotaryEmbedding")
    binder = Binder(manager_of(vendors, counted_reference("rotary_embedding")))
    assert binder.bind(Model(layer), Load()).bound == 1
    query, positions = torch.randn(3, HEAD, generator=rng), torch.tensor([3, 5, 7])
    CALLS.clear()
    layer(positions, query, query.clone())
    layer.cos_sin_cache = layer.cos_sin_cache.bfloat16()
    agree_with_native(layer, positions, query, query.clone())
    assert CALLS[:2] == ["vendor", "vendor"] and set(CALLS[2:]) == {"rotary_embedding"}


def test_a_call_in_a_dtype_that_is_not_supported_goes_to_sglang(rng: torch.Generator) -> None:
    """Some models rotate, or normalise, in fp32 within a bf16 model (models/stablelm.py)."""
    only_bf16 = frozenset({torch.bfloat16})
    norm, activation, embedding = (
        NORM_LAYERS["RMSNorm"](),
        ACTIVATION_LAYERS["SiluAndMul"](),
        rotary("RotaryEmbedding", dtype=torch.bfloat16),
    )
    binder = Binder(manager_of(*(counted_reference(op, supported_dtypes=only_bf16) for op in LAYERS)))
    assert binder.bind(Model(norm, activation, embedding, dtype=torch.bfloat16), Load()).bound == 3
    CALLS.clear()
    for dtype, expected in ((torch.float32, []), (torch.bfloat16, ["rms_norm", "rms_norm", "silu_and_mul", "rotary_embedding"])):
        x = torch.randn(3, HIDDEN, generator=rng).to(dtype)
        norm(x.clone()), norm(x.clone(), x.clone()), activation(x)
        embedding(torch.arange(3), x.clone(), x.clone())
        assert expected == CALLS


@pytest.mark.parametrize("shape", [(0, 4 * HEAD), (0, 4, HEAD)])
def test_rotary_without_tokens(shape: tuple[int, ...]) -> None:
    layer = rotary("RotaryEmbedding")
    bind(layer)
    query, key = layer(torch.zeros(0, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape))
    assert query.shape == key.shape == shape


def test_rotary_follows_a_cache_that_grows(rng: torch.Generator) -> None:
    layer: Any = rotary("RotaryEmbedding")
    bind(layer)
    query = torch.randn(1, HEAD, generator=rng)
    layer(torch.tensor([3]), query, query)
    layer._ensure_cos_sin_cache_length(5000)
    assert layer.cos_sin_cache.shape[0] > 5000
    agree_with_native(layer, torch.tensor([5000]), query, query)


def test_rotary_follows_a_cache_that_is_replaced(rng: torch.Generator) -> None:
    layer: Any = rotary("RotaryEmbedding")
    bind(layer)
    query = torch.randn(1, HEAD, generator=rng)
    layer(torch.tensor([3]), query, query)
    layer.cos_sin_cache = layer.cos_sin_cache.flip(0).contiguous()
    agree_with_native(layer, torch.tensor([3]), query, query)


def test_nothing_of_the_cache_is_made_anew_per_call() -> None:
    layer: Any = rotary("RotaryEmbedding")
    seen = []

    def keep(obj: Any, query: Any, key: Any, cos: Any, sin: Any, *_: Any) -> Any:
        seen.append((cos, sin))
        return query, key

    bind(layer, rotary_embedding=keep)
    seen.clear()
    query = torch.zeros(1, HEAD)
    for _ in range(3):
        layer(torch.tensor([3]), query, query)
    assert all(cos is seen[0][0] and sin is seen[0][1] for cos, sin in seen)
    assert seen[0][0].data_ptr() == layer.cos_sin_cache.data_ptr(), "cos is a view of the cache, not a copy"


def test_a_swapped_rotary_layout_does_not_agree(rng: torch.Generator) -> None:
    def swapped(obj: Any, query: Any, key: Any, cos: Any, sin: Any, position_ids: Any, rotary_interleaved: bool, inplace: bool) -> Any:
        return reference.rotary_embedding(obj, query, key, cos, sin, position_ids, not rotary_interleaved, inplace)

    layer = rotary("RotaryEmbedding")
    bind(layer, rotary_embedding=swapped)
    query = torch.randn(4, HEAD, generator=rng)
    with pytest.raises(AssertionError):
        agree_with_native(layer, torch.arange(1, 5), query, query)
