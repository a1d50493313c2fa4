# SPDX-License-Identifier: Apache-2.0
"""SGLang's norms and activations: bound they compute what SGLang computes, or they are left alone."""

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import Norm, assert_within
from implementations import manager_of
from torch import nn

from sglang_fl.check.exact import normalization as exact
from sglang_fl.dispatch import BackendImplKind, OpImpl, SelectionPolicy, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.catalog import CUSTOM_FORWARD

from .sglang_layers import ACTIVATION_LAYERS, HIDDEN, NORM_LAYERS, OP_OF, Model, sglang_class
from .test_bridges import CALLS, bind, counted, reference

pytestmark = pytest.mark.usefixtures("reference_policy")


def bound_norm(rng: torch.Generator, name: str, **options: Any) -> Any:
    """A norm with weights that matter, bound."""
    layer = NORM_LAYERS[name](**options)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(HIDDEN, generator=rng))
    assert bind(layer).bound == 1
    return layer


@pytest.mark.parametrize("name", NORM_LAYERS)
def test_norm_class(rng: torch.Generator, name: str) -> None:
    if name in CUSTOM_FORWARD:
        layer = NORM_LAYERS[name]()
        report = bind(layer)
        assert report.bound == 0 and layer._forward_method is None, report.summary()
        return
    norms_agree(bound_norm(rng, name), torch.randn(5, HIDDEN, generator=rng), torch.randn(5, HIDDEN, generator=rng))
    assert set(CALLS) == {OP_OF[name]}


def norms_agree(layer: Any, x: torch.Tensor, residual: torch.Tensor) -> None:
    """With a residual too, where the layer takes one."""
    native = layer.forward_native(x.clone())
    terms = native.double().abs()
    if hasattr(layer, "bias"):
        # What the mean is wrong by is in every number, and a bias may cancel what it is added to.
        terms = exact.layer_norm(x, layer.weight.detach(), layer.bias.detach(), layer.variance_epsilon)[0].terms
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


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("GeluAndMul", "SGLANG_NPU_FORWARD_NATIVE_GELUTANH"),
        ("GemmaRMSNorm", "SGLANG_NPU_FORWARD_NATIVE_GEMMA_RMS_NORM"),
        ("Gemma3RMSNorm", "SGLANG_NPU_FORWARD_NATIVE_GEMMA_RMS_NORM"),
    ],
)
def test_a_switch_of_sglangs_on_an_npu_is_heeded(name: str, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = NORM_LAYERS | ACTIVATION_LAYERS
    monkeypatch.setenv(switch, "1")
    assert bind(layers[name]()).bound == 1, "it is for NPUs"
    monkeypatch.setattr("sglang.srt.utils.is_npu", lambda: True)
    assert f"{switch} is set" in bind(layers[name]()).summary()
    monkeypatch.delenv(switch)
    assert bind(layers[name]()).bound == 1


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
    broken = False

    def fails(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if broken:
            raise ArithmeticError("too late")
        return reference.gemma_rms_norm(obj, x, residual)

    rows = (
        ("default.flagos", BackendImplKind.DEFAULT, fails),
        ("reference.torch", BackendImplKind.REFERENCE, reference.gemma_rms_norm),
    )
    set_global_policy(SelectionPolicy("flagos"))
    layer: Any = NORM_LAYERS["Gemma3RMSNorm"]()
    impls = (OpImpl("gemma_rms_norm", impl_id, kind, counted(impl_id, fn), writes_inputs=False) for impl_id, kind, fn in rows)
    binder = Binder(manager_of(*impls))
    assert binder.bind(Model(layer), Load()).bound == 1
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

    impls = manager_of(OpImpl("relu2", "reference.torch", BackendImplKind.REFERENCE, keep))
    for name in ("fc1", "c_fc", "up_proj", "nothing known"):
        mlp = nn.Module()
        mlp.act, mlp.embedding = ACTIVATION_LAYERS["ReLU2"](), nn.Parameter(torch.zeros(1))
        setattr(mlp, name, SimpleNamespace(output_size_per_partition=200))
        Binder(impls).bind(mlp, Load())
    assert widths == [200, 200, 200, 128]


def test_norm_whose_output_sglang_quantises_is_left() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    linear = nn.Module()
    linear.quant_method = Fp8LinearMethod.__new__(Fp8LinearMethod)
    linear.input_scale = torch.ones(1)
    layer: Any = NORM_LAYERS["RMSNorm"]()
    layer.fuse_input_quant(linear)
    assert "quantises its output to FP8" in bind(layer).summary()


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


@pytest.mark.parametrize("shape", [(0, HIDDEN), (1, HIDDEN), (3, 4, HIDDEN), (2, 0, HIDDEN)])
@pytest.mark.parametrize("name", sorted(NORM_LAYERS.keys() - CUSTOM_FORWARD))
def test_norm_shapes(rng: torch.Generator, name: str, shape: tuple[int, ...]) -> None:
    layer = bound_norm(rng, name)
    norms_agree(layer, torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))
    norms_agree(layer, torch.randn(*shape[:-1], 2 * HIDDEN, generator=rng)[..., :HIDDEN], torch.randn(shape, generator=rng))


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
