# SPDX-License-Identifier: Apache-2.0
"""Every SGLang class that a bridge is for: bound it computes what SGLang computes, or it is left alone."""

import ast
import copy
import inspect
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
import torch
from accuracy import U32, Norm, assert_within
from torch import nn

from sglang_fl.config import Settings
from sglang_fl.dispatch import BackendImplKind, OpImpl, OpManager, OpRegistry, SelectionPolicy, reset_global_policy, set_global_policy
from sglang_fl.dispatch.backends.reference.reference import ReferenceBackend
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.catalog import BESIDE, LAYERS, OVERRIDING
from sglang_fl.dispatch.bridge.report import BindReport

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

reference = ReferenceBackend()
CALLS: list[str] = []


OP_OF = {name: op for op, layers in LAYERS.items() for _, name in layers}


def counted(op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS.append(op)
        return fn(*args, **kwargs)

    return call


def bind(
    *layers: nn.Module, dtype: torch.dtype = torch.float32, settings: Settings | None = None, **wrong: Callable[..., Any]
) -> BindReport:
    """Bind layers to the reference, or to a function given for an operator; the calls of the trial are not counted."""
    registry = OpRegistry()
    for op in LAYERS:
        registry.register_impl(
            OpImpl(op, "reference.torch", BackendImplKind.REFERENCE, counted(op, wrong.get(op) or getattr(reference, op)))
        )
    binder = Binder(OpManager(registry), settings or Settings())
    for layer in layers:
        layer.test_keeps_alive = binder  # type: ignore[assignment]
    report = binder.bind(Model(*layers, dtype=dtype))
    CALLS.clear()
    return report


@pytest.fixture(autouse=True)
def reference_policy() -> Iterator[None]:
    set_global_policy(SelectionPolicy("reference"))
    yield
    reset_global_policy()


@pytest.fixture
def rng() -> torch.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def sglang_subclasses() -> dict[str, set[str]]:
    """operator -> its classes and all their subclasses, read from the source of the installed SGLang."""
    roots = {op: {layers[0][1]} | {name for _, name in layers if name in BESIDE} for op, layers in LAYERS.items()}
    parents: dict[str, set[str]] = {}
    bases = frozenset().union(*roots.values())
    for path in (Path(sglang.__file__).parent / "srt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not any(re.search(rf"^class (\w+\(.*{name}|{name}\b)", text, re.MULTILINE) for name in bases):
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
    if name in OVERRIDING:
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


def bound_norm(rng: torch.Generator, name: str, **options: Any) -> Any:
    """A norm with weights that matter, bound."""
    layer = NORM_LAYERS[name](**options)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(HIDDEN, generator=rng))
    assert bind(layer).bound == 1
    return layer


@pytest.mark.parametrize("name", NORM_LAYERS)
def test_norm_class(rng: torch.Generator, name: str) -> None:
    if name in OVERRIDING:
        layer = NORM_LAYERS[name]()
        report = bind(layer)
        assert report.bound == 0 and layer._forward_method is None, report.summary()
        return
    norms_agree(bound_norm(rng, name), torch.randn(5, HIDDEN, generator=rng), torch.randn(5, HIDDEN, generator=rng))
    assert set(CALLS) == {OP_OF[name]}


def norms_agree(layer: Any, x: torch.Tensor, residual: torch.Tensor) -> None:
    """With a residual too, where the layer takes one."""
    native = layer.forward_native(x.clone())
    # A bias may cancel what it is added to.
    terms = native.double().abs() + (layer.bias.detach().double().abs() if hasattr(layer, "bias") else 0)
    assert_within("result", layer(x.clone()), native.double(), 2 * terms, roundings=16)
    if "residual" not in inspect.signature(layer.forward_native).parameters:
        return
    normed, total = layer(x.clone(), residual.clone())
    native, native_total = layer.forward_native(x.clone(), residual.clone())
    assert_within("normed", normed, native.double(), native.double().abs(), roundings=16)
    assert torch.equal(total, native_total)


@pytest.mark.parametrize("name", ACTIVATION_LAYERS)
def test_activation_class(rng: torch.Generator, name: str) -> None:
    activations_agree(rng, ACTIVATION_LAYERS[name]())
    assert [OP_OF[name]] == CALLS


def activations_agree(rng: torch.Generator, layer: Any) -> None:
    assert bind(layer).bound == 1
    x = torch.randn(3, 5, 64, generator=rng)
    native = layer.forward_native(x)
    # GELU's tail is the difference of two numbers near 1.
    terms = native.double().abs() + (x[..., : native.shape[-1]].double().abs().max() if "GE" in type(layer).__name__.upper() else 0)
    assert_within("result", layer(x), native.double(), terms, roundings=8)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_kinds_of_gelu(rng: torch.Generator, approximate: str) -> None:
    layer = ACTIVATION_LAYERS["GeluAndMul"](approximate=approximate)
    activations_agree(rng, layer)
    other = ACTIVATION_LAYERS["GeluAndMul"](approximate="tanh" if approximate == "none" else "none")
    x = torch.randn(3, 64, generator=rng)
    assert (layer(x) - other.forward_native(x)).abs().max() > 1e-5


def test_another_kind_of_gelu_is_left() -> None:
    assert "approximate='fast'" in bind(ACTIVATION_LAYERS["GeluAndMul"](approximate="fast")).summary()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"var_hidden_size": 32}, "variance_size_override=32"),
        ({"cast_x_before_out_mul": True}, "cast_x_before_out_mul=True"),
        ({"fp32_residual": True}, "fp32_residual=True"),
        ({"override_orig_dtype": torch.float32}, "override_orig_dtype=torch.float32"),
        ({"force_native": True}, "SGLang pinned it to forward_native"),
    ],
)
def test_norm_with_an_option_that_changes_its_result_is_left(options: dict[str, Any], reason: str) -> None:
    layer: Any = NORM_LAYERS["RMSNorm"](**options)
    before = layer._forward_method
    report = bind(layer)
    assert (report.bound, report.left) == (0, 1)
    assert reason in report.summary()
    assert layer._forward_method == before


@pytest.mark.parametrize("options", [{"has_weight": False}, {"weight_dtype": torch.bfloat16}, {"eps": 1e-3}, {"var_hidden_size": HIDDEN}])
def test_norm_with_an_option_that_the_signature_can_say(rng: torch.Generator, options: dict[str, Any]) -> None:
    layer = NORM_LAYERS["RMSNorm"](**options)
    assert bind(layer).bound == 1
    norms_agree(layer, torch.randn(4, HIDDEN, generator=rng), torch.randn(4, HIDDEN, generator=rng))


def test_every_option_of_the_installed_norm_is_known() -> None:
    """A new option of SGLang's RMSNorm may change its result: then the bridge must look at it."""
    known = {
        "hidden_size",
        "eps",
        "var_hidden_size",
        "cast_x_before_out_mul",
        "fp32_residual",
        "has_weight",
        "weight_dtype",
        "override_orig_dtype",
    }
    known |= {"x_pad_to_multiple", "force_native", "self"}
    assert set(inspect.signature(sglang_class("RMSNorm").__init__).parameters) == known


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("GeluAndMul", {"approximate"}),
        ("Gemma3RMSNorm", {"dim", "eps"}),
        ("Gemma4RMSNorm", {"dim", "eps", "scale_shift", "with_scale"}),
        ("GemmaRMSNorm", {"hidden_size", "eps"}),
        ("LayerNorm", {"hidden_size", "eps", "elementwise_affine", "bias", "dtype"}),
        ("NewGELU", set()),
        ("QuickGELU", set()),
        ("RMSNormWithoutScale", {"hidden_size", "eps"}),
        ("ReLU2", set()),
    ],
)
def test_every_option_of_the_installed_layers_is_known(name: str, known: set[str]) -> None:
    assert set(inspect.signature(sglang_class(name)).parameters) == known


@pytest.mark.parametrize("name", ["Gemma3RMSNorm", "Gemma4RMSNorm", "GemmaRMSNorm", "LayerNorm", "RMSNormWithoutScale"])
def test_epsilon_of_a_norm(rng: torch.Generator, name: str) -> None:
    small = 1e-2 * torch.randn(4, HIDDEN, generator=rng)
    norms_agree(bound_norm(rng, name, eps=1e-3), small, small)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Gemma4RMSNorm", {"scale_shift": 1.0}, "scale_shift=1.0"),
        ("LayerNorm", {"elementwise_affine": False}, "elementwise_affine=False"),
        ("LayerNorm", {"bias": False}, "use_bias=False"),
    ],
)
def test_other_norms_with_an_option_that_the_signature_cannot_say(name: str, options: dict[str, Any], reason: str) -> None:
    layer = NORM_LAYERS[name](**options)
    assert reason in bind(layer).summary() and layer._forward_method is None


def test_gemma_4_without_weights(rng: torch.Generator) -> None:
    x = torch.randn(4, HIDDEN, generator=rng)
    for scale_shift in (0.0, 1.0):
        norms_agree(bound_norm(rng, "Gemma4RMSNorm", with_scale=False, scale_shift=scale_shift), x, x)


def test_a_norm_follows_weights_that_are_replaced(rng: torch.Generator) -> None:
    """In place, by a new parameter, and in a copy of the layer."""
    x = torch.randn(4, HIDDEN, generator=rng)
    for name in ("Gemma3RMSNorm", "Gemma4RMSNorm", "GemmaRMSNorm"):
        layer = bound_norm(rng, name)
        layer(x)
        layer.weight.data.copy_(torch.randn(HIDDEN, generator=rng))
        norms_agree(layer, x, x)
        layer.weight = nn.Parameter(torch.randn(HIDDEN, generator=rng))
        norms_agree(layer, x, x)
        del layer.test_keeps_alive
        twin = copy.deepcopy(layer)
        twin.weight.data.copy_(torch.randn(HIDDEN, generator=rng))
        norms_agree(twin, x, x)
        norms_agree(layer, x, x)


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_layer_norm_works_in_its_own_dtype(rng: torch.Generator, working: torch.dtype, given: torch.dtype) -> None:
    layer = bound_norm(rng, "LayerNorm", dtype=working)
    x = (3 + torch.randn(4, HIDDEN, generator=rng)).to(given)
    got, native = layer(x), layer.forward_native(x)
    ours = working in (torch.float32, given)
    assert (["layer_norm"] if ours else []) == CALLS
    assert got.dtype == given and (ours or torch.equal(got, native))
    assert_within("result", got, native.double(), 2 * native.double().abs() + 8, roundings=16)


def test_a_failing_norm_gives_way_to_one_that_reads_the_same_weights(rng: torch.Generator) -> None:
    """Gemma3RMSNorm has no variance_epsilon: what takes over is called with what stands for it."""
    registry = OpRegistry()
    broken = False

    def fails(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if broken:
            raise ArithmeticError("too late")
        return reference.gemma_rms_norm(obj, x, residual)

    for impl_id, kind, fn in (
        ("default.flagos", BackendImplKind.DEFAULT, fails),
        ("reference.torch", BackendImplKind.REFERENCE, reference.gemma_rms_norm),
    ):
        registry.register_impl(OpImpl("gemma_rms_norm", impl_id, kind, counted(impl_id, fn), writes_inputs=False))
    set_global_policy(SelectionPolicy("flagos"))
    layer: Any = NORM_LAYERS["Gemma3RMSNorm"]()
    binder = Binder(OpManager(registry), Settings())
    assert binder.bind(Model(layer)).bound == 1
    broken = True
    CALLS.clear()
    norms_agree(layer, torch.randn(4, HIDDEN, generator=rng), torch.randn(4, HIDDEN, generator=rng))
    # What takes over is tried before its first call.
    assert ["default.flagos", *["reference.torch"] * 3, "default.flagos", "reference.torch"] == CALLS


def test_the_width_behind_an_mlps_first_matrix_is_tried(rng: torch.Generator) -> None:
    widths = []

    def keep(obj: Any, x: torch.Tensor) -> torch.Tensor:
        widths.append(x.shape[-1])
        return torch.zeros_like(x)

    registry = OpRegistry()
    registry.register_impl(OpImpl("relu2", "reference.torch", BackendImplKind.REFERENCE, keep))
    for name in ("fc1", "c_fc", "up_proj", "nothing known"):
        mlp = nn.Module()
        mlp.act, mlp.embedding = ACTIVATION_LAYERS["ReLU2"](), nn.Parameter(torch.zeros(1))
        setattr(mlp, name, SimpleNamespace(output_size_per_partition=200))
        Binder(OpManager(registry), Settings()).bind(mlp)
    assert widths == [200, 200, 200, 128]


def test_norm_whose_output_sglang_quantises_is_left() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    linear = nn.Module()
    linear.quant_method = Fp8LinearMethod.__new__(Fp8LinearMethod)
    linear.input_scale = torch.ones(1)
    layer: Any = NORM_LAYERS["RMSNorm"]()
    layer.fuse_input_quant(linear)
    assert "quantised to FP8" in bind(layer).summary()


def test_norm_that_carries_an_unquantised_linear_is_bound() -> None:
    layer: Any = NORM_LAYERS["RMSNorm"]()
    layer.fuse_input_quant(nn.Linear(2, 2))
    assert bind(layer).bound == 1


@pytest.mark.parametrize("name", ["RMSNorm", "GemmaRMSNorm"])
def test_post_residual_addition_goes_to_sglang(rng: torch.Generator, name: str) -> None:
    layer: Any = NORM_LAYERS[name]()
    bind(layer)
    x, residual, post = (torch.randn(3, HIDDEN, generator=rng) for _ in range(3))
    got = layer(x.clone(), residual.clone(), post.clone())
    native = layer.forward_native(x, residual, post)
    assert all(torch.equal(a, b) for a, b in zip(got, native, strict=True))
    assert CALLS == []


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


@pytest.mark.parametrize("shape", [(0, HIDDEN), (1, HIDDEN), (3, 4, HIDDEN), (2, 0, HIDDEN)])
@pytest.mark.parametrize("name", sorted(NORM_LAYERS.keys() - OVERRIDING))
def test_norm_shapes(rng: torch.Generator, name: str, shape: tuple[int, ...]) -> None:
    layer = bound_norm(rng, name)
    norms_agree(layer, torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))
    norms_agree(layer, torch.randn(*shape[:-1], 2 * HIDDEN, generator=rng)[..., :HIDDEN], torch.randn(shape, generator=rng))


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
    monkeypatch.setattr("sglang_fl.dispatch.bridge.base.overridden", lambda cls, base: set())

    def writing(obj: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        rotated = reference.rotary_embedding(obj, q, k, *rest)
        return q.copy_(rotated[0]), k.copy_(rotated[1])

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


def test_a_call_in_a_dtype_that_is_not_supported_goes_to_sglang(rng: torch.Generator) -> None:
    """Some models rotate, or normalise, in fp32 within a bf16 model (models/stablelm.py)."""
    registry = OpRegistry()
    for op in LAYERS:
        fn = counted(op, getattr(reference, op))
        registry.register_impl(OpImpl(op, "reference.torch", BackendImplKind.REFERENCE, fn, supported_dtypes=frozenset({torch.bfloat16})))
    norm, activation, embedding = (
        NORM_LAYERS["RMSNorm"](),
        ACTIVATION_LAYERS["SiluAndMul"](),
        rotary("RotaryEmbedding", dtype=torch.bfloat16),
    )
    binder = Binder(OpManager(registry), Settings())
    assert binder.bind(Model(norm, activation, embedding, dtype=torch.bfloat16)).bound == 3
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


def eps_a_thousand_times_too_large(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return reference.rms_norm(Norm(layer.weight, 1e-3), x, residual)


def residual_dropped(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    normed = reference.rms_norm(layer, x)
    return normed if residual is None else (normed, residual)


def bf16_accumulation(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    hidden = x if residual is None else x + residual
    mean = hidden.bfloat16().square().mean(-1, keepdim=True).float()
    normed = hidden * torch.rsqrt(mean + layer.variance_epsilon) * layer.weight
    return normed if residual is None else (normed, hidden)


@pytest.mark.parametrize("mistake", [eps_a_thousand_times_too_large, residual_dropped, bf16_accumulation])
def test_a_wrong_norm_does_not_agree(rng: torch.Generator, mistake: Callable[..., Any]) -> None:
    layer = NORM_LAYERS["RMSNorm"]()
    assert bind(layer, rms_norm=mistake).bound == 1
    with pytest.raises(AssertionError):
        norms_agree(layer, torch.randn(8, HIDDEN, generator=rng), torch.randn(8, HIDDEN, generator=rng))


def test_a_swapped_rotary_layout_does_not_agree(rng: torch.Generator) -> None:
    def swapped(obj: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool, inplace: bool) -> Any:
        return reference.rotary_embedding(obj, q, k, c, s, p, not interleaved, inplace)

    layer = rotary("RotaryEmbedding")
    bind(layer, rotary_embedding=swapped)
    query = torch.randn(4, HEAD, generator=rng)
    with pytest.raises(AssertionError):
        agree_with_native(layer, torch.arange(1, 5), query, query)
