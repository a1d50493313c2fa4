# SPDX-License-Identifier: Apache-2.0
"""SGLang's routers and experts: bound they compute what SGLang computes, or they are left alone."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_within
from backend_functions import reference
from e2e import field_backend
from implementations import manager_of
from torch import nn

from sglang_fl.dispatch import (
    BackendImplKind,
    OpImpl,
    SelectionPolicy,
    policy_context,
    set_global_policy,
    with_preference,
)
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.layer import LayerSocket
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.manager import OpManager

from .sglang_layers import EXPERTS, HIDDEN, MOE_LAYERS, Model, experts, in_a_server, router
from .test_bridges import CALLS, bind

pytestmark = pytest.mark.usefixtures("reference_policy")


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    with in_a_server():
        yield


def tokens(rng: torch.Generator, count: int = 7, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and logits without ties."""
    logits = (torch.rand(count, EXPERTS, generator=rng).argsort(-1) - EXPERTS // 2) / 4
    return torch.randn(count, HIDDEN, generator=rng).to(dtype), logits.to(dtype)


def by_expert(output: Any) -> torch.Tensor:
    """``[num_tokens, experts]``: the weights, wherever their column stands."""
    ids = output.topk_ids.long()
    assert output.topk_weights.dtype == torch.float32
    real = ids >= 0
    dense = torch.zeros(len(ids), EXPERTS + 1)
    return dense.scatter_add_(1, ids.clamp_min(0), torch.where(real, output.topk_weights, 0.0))


@pytest.mark.parametrize("name", MOE_LAYERS)
def test_class(name: str) -> None:
    report = bind(MOE_LAYERS[name]())
    left = {"NPUMXFP8OnlineMoEMethod": "it has no runner", "_InklingUnquantizedFusedMoEMethod": "it has no runner"}
    assert report.bound == (name not in left), report.summary()
    assert left.get(name, "") in report.summary()


def test_a_models_modules_reach_the_method_of_its_experts() -> None:
    layer = experts()
    assert dict(layer.named_modules())["quant_method"] is layer.quant_method
    block = nn.ModuleDict({"topk": router(), "experts": layer})
    binder = Binder(OpManager())
    report = binder.bind(Model(block), Load())
    assert report.bound == 2, report.summary()
    names = {socket.path: socket.context.num_experts for socket in binder._sockets.values() if isinstance(socket, LayerSocket)}
    assert names == {"layers.0.topk": EXPERTS, "layers.0.experts.quant_method": None}


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, weights as they are": {"renormalize": False},
    "softmax, scaled": {"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True},
    "a factor that the experts apply": {"routed_scaling_factor": 2.5},
    "softmax, groups": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sigmoid, bias": {"scoring_func": "sigmoid", "correction_bias": torch.linspace(-1, 1, EXPERTS)},
    "sigmoid, groups": {"scoring_func": "sigmoid", "use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1},
    "bias, groups": {
        "scoring_func": "sigmoid",
        "use_grouped_topk": True,
        "num_expert_group": 2,
        "topk_group": 1,
        "correction_bias": torch.linspace(-1, 1, EXPERTS),
        "routed_scaling_factor": 2.5,
        "apply_routed_scaling_factor_on_output": True,
    },
    "bias, groups, softmax by name": {
        "use_grouped_topk": True,
        "num_expert_group": 2,
        "topk_group": 1,
        "correction_bias": torch.linspace(-1, 1, EXPERTS),
    },
}


@pytest.mark.parametrize("real", [None, 4])
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
def test_routing_agrees_with_sglangs_own(rng: torch.Generator, options: dict[str, Any], real: int | None) -> None:
    layer = router(**options)
    assert bind(layer).bound == 1
    x, logits = tokens(rng)
    padding = {} if real is None else {"num_token_non_padded": torch.tensor([real], dtype=torch.int32)}
    got, native = layer(x, logits, **padding), layer.forward_native(x, logits, **padding)
    assert CALLS == ["topk"]
    assert type(got) is type(native) and got.router_logits is logits
    assert torch.equal(
        got.topk_ids[slice(real, None) if real else slice(0, 0)], native.topk_ids[slice(real, None) if real else slice(0, 0)]
    )
    wanted = by_expert(native)
    assert_within("topk", by_expert(got), wanted.double(), wanted.double(), roundings=32)


def test_routing_with_a_shared_expert(rng: torch.Generator) -> None:
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.runtime_context import get_model

    groups = {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    bias = {"correction_bias": torch.linspace(-1, 1, EXPERTS)}
    with get_model().override(shared_experts=SharedExpertsConfig(num_fused_shared_experts=1)):
        for more in ({}, bias, {**bias, "fused_shared_experts_scaling_factor": 0.5}):
            layer = router(**groups, **more)
            assert layer.topk_config.top_k == 3
            assert bind(layer).bound == 1
            x, logits = tokens(rng)
            got, native = by_expert(layer(x, logits)), by_expert(layer.forward_native(x, logits))
            assert_within("topk", got, native.double(), native.double(), roundings=32)
        layer = router()
        assert "SGLang appends no shared expert" in bind(layer).summary()
    with get_model().override(shared_experts=SharedExpertsConfig(num_fused_shared_experts=2)):
        assert "it appends 2 shared experts" in bind(router(**groups)).summary()
    with get_model().override(shared_experts=SharedExpertsConfig(num_fused_shared_experts=1)):
        del groups["routed_scaling_factor"]
        assert "no weight of its own" in bind(router(**groups)).summary()


def routes_somewhere(**_: Any) -> Any:
    raise AssertionError("never called")


def changed(change: Callable[[Any], None]) -> Callable[[], Any]:
    def make() -> Any:
        layer = router()
        change(layer)
        return layer

    return make


def output_format(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        from sglang.srt.layers.moe.topk import TopKOutputFormat

        layer.topk_config.output_format = TopKOutputFormat[name]

    return change


def trtllm_routed(layer: Any) -> None:
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    layer.topk_config.runner_backend = MoeRunnerBackend.FLASHINFER_TRTLLM_ROUTED


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: router(custom_routing_function=routes_somewhere), "custom routing function"),
        (lambda: router(bind=False), "its runner needs the output format None"),
        (changed(output_format("BYPASSED")), "its runner needs the output format BYPASSED"),
        (changed(output_format("TRITON_KERNEL")), "its runner needs the output format TRITON_KERNEL"),
        (changed(output_format("PACKED")), "its runner needs the output format PACKED"),
        (changed(trtllm_routed), "its runner takes raw logits"),
        (changed(lambda layer: setattr(layer.topk_config, "fused_gate_packed_ids", True)), "fused_gate_packed_ids=True"),
        (changed(lambda layer: setattr(layer, "waterfill_balancer", object())), "waterfill balances its shared experts"),
        (lambda: router(scoring_func="sqrtsoftplus"), "scoring_func=sqrtsoftplus"),
        (lambda: router(correction_bias=torch.zeros(EXPERTS)), "SGLang's own forwards disagree on a correction bias of softmax scores"),
        (lambda: router(scoring_func="sigmoid", correction_bias=torch.zeros(3, EXPERTS)), "its correction bias differs by token"),
    ],
)
def test_routing_that_the_signature_cannot_say_is_left(make: Callable[[], Any], reason: str) -> None:
    layer = make()
    report = bind(layer)
    assert report.bound == 0 and layer._forward_method is None
    assert reason in report.summary()


@pytest.mark.parametrize(
    ("arguments", "reason", "both"),
    [
        ({"ep_dispatch_algorithm": "static"}, "--ep-dispatch-algorithm static replicates experts", False),
        ({"expert_distribution_recorder_mode": "stat"}, "--expert-distribution-recorder-mode records its choices", False),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts records its choices", False),
        ({"enable_symm_mem": True}, "--enable-symm-mem needs results in symmetric memory", True),
    ],
)
def test_a_servers_arguments_that_want_sglangs_own(arguments: dict[str, Any], reason: str, both: bool) -> None:
    from sglang.srt.runtime_context import get_exec

    with in_a_server():
        execution = get_exec()
        for bag in (execution.moe, execution.features, execution.comm):
            for name, value in arguments.items():
                if name in bag:
                    bag._set(name, value)
        layer, method = router(), experts().quant_method
        assert reason in bind(layer).summary()
        assert (bind(method).bound == 0) == both
        if both:
            assert reason in bind(method).summary()


def test_simulated_routing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SIMULATE_UNIFORM_EXPERTS", "1")
    assert "SGLang simulates its routing" in bind(router()).summary()


def test_draft_routers_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.runtime_context import get_exec

    with get_exec().features.override(enable_return_routed_experts=True):
        assert bind(router(is_draft=True)).bound == 1


def test_rocm_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe import topk

    monkeypatch.setattr(topk, "_is_hip", True)
    assert "differently on ROCm" in bind(router()).summary()
    assert "differently on ROCm" in bind(experts().quant_method).summary()


def test_calls_that_the_signature_cannot_say_go_to_sglang(rng: torch.Generator) -> None:
    layer = router(scoring_func="sigmoid")
    bind(layer)
    x, logits = tokens(rng)
    bias = torch.zeros(len(x), EXPERTS)
    got = layer(x, logits, dynamic_expert_bias=bias)
    assert CALLS == [] and got.topk_ids.shape == (7, 2)
    with pytest.raises(AttributeError):  # SGLang reads what we have not looked at
        layer(x, logits, expert_location_dispatch_info=object())
    assert CALLS == []


def test_the_padding_of_the_forward_pass_is_known(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models do not hand it over: SGLang's router asks the pass that is running."""
    from sglang.srt.layers.moe import topk

    monkeypatch.setattr(topk, "has_forward_context", lambda: True)
    padding = torch.tensor(5, dtype=torch.int32)
    monkeypatch.setattr(topk, "get_forward_context", lambda: SimpleNamespace(moe_num_token_non_padded=lambda: padding))
    layer = router()
    bind(layer)
    got = layer(*tokens(rng))
    assert (got.topk_ids[5:] == -1).all() and (got.topk_ids[:5] >= 0).all()


def test_on_an_npu_padded_tokens_keep_their_experts(rng: torch.Generator) -> None:
    layer = router()
    layer._resolve_forward_method = lambda: layer.forward_npu
    bind(layer)
    got = layer(*tokens(rng), num_token_non_padded=torch.tensor([5]))
    assert (got.topk_ids >= 0).all()
    assert (got.topk_weights[5:] == 0).all() and (got.topk_weights[:5] > 0).all()


def test_arguments_by_name(rng: torch.Generator) -> None:
    """As SGLang's two-batch overlap and FusedMoE hand them over."""
    layer, owner = router(), experts()
    bind(layer, owner.quant_method)
    x, logits = tokens(rng)
    routed = layer(hidden_states=x, router_logits=logits)
    owner(x, routed)
    assert CALLS == ["topk", "fused_moe"]


def dispatched(owner: Any, layer: Any, rng: torch.Generator, dtype: torch.dtype) -> Any:
    x, logits = tokens(rng, dtype=dtype)
    return owner.dispatcher.dispatch(x, layer.forward_native(x, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"with_bias": True}, {"top_k": 1, "inplace": False}, {"routed_scaling_factor": 2.5}, {"reduce_results": True}]
)
def test_experts_agree_with_sglangs_own(rng: torch.Generator, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Native rounds after each product, each bias and the activation; the reference rounds once."""
    owner = experts(dtype=dtype, **options)
    method = owner.quant_method
    assert bind(method, dtype=dtype).bound == 1
    given = dispatched(owner, router(top_k=options.get("top_k", 2)), rng, dtype)
    kept = given.hidden_states.clone()
    got, native = method.apply(owner, given), method.forward_native(owner, given)
    assert CALLS == ["fused_moe"]
    assert type(got) is type(native)
    assert torch.equal(given.hidden_states, kept), "models go on to read them"
    sizes = owner.w2_weight.abs().double().amax() * owner.w2_weight.shape[-1] + (3 if options.get("with_bias") else 0)
    terms = sizes.expand(got.hidden_states.shape) * 3
    roundings = 64 * max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    assert_within("fused_moe", got.hidden_states, native.hidden_states.double(), terms, roundings)


def test_the_routed_scaling_factor_where_sglangs_own_applies_it(rng: torch.Generator) -> None:
    """On CUDA SGLang's runner multiplies with it, elsewhere the model does."""
    seen = []

    def keep(obj: Any, layer: Any, dispatch_output: Any) -> torch.Tensor:
        seen.append(dispatch_output.topk_output.topk_weights)
        return reference.fused_moe(obj, layer, dispatch_output)

    owner = experts(routed_scaling_factor=2.5)
    method = owner.quant_method
    given = dispatched(owner, router(), rng, torch.float32)
    for own, factor in ((method.forward_cuda, 2.5), (method.forward_native, 1.0)):
        method._resolve_forward_method = lambda own=own: own
        method._forward_method = None
        bind(method, fused_moe=keep)
        method.apply(owner, given)
        assert torch.equal(seen[-1], given.topk_output.topk_weights * factor)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "with_bias": True}, "gemm1_alpha=1.702"),
        ({"swiglu_limit": 10.0}, "swiglu_limit=10.0"),
        ({"no_combine": True, "inplace": False}, "no_combine=True"),
        ({"activation": "situ"}, "activation=situ, is_gated=True"),
        ({"activation": "gelu"}, "SGLang's forward_cpu approximates gelu with tanh"),
        ({"apply_router_weight_on_input": True, "with_bias": True}, "router weights are applied to the input of experts with a bias"),
    ],
)
def test_experts_with_an_option_that_the_signature_cannot_say_are_left(options: dict[str, Any], reason: str) -> None:
    method = experts(**options).quant_method
    report = bind(method)
    assert report.bound == 0 and method._forward_method is None
    assert reason in report.summary()


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu_tanh"},
        {"activation": "relu2", "is_gated": False},
        {"apply_router_weight_on_input": True, "top_k": 1},
    ],
)
def test_experts_that_sglangs_plain_forward_cannot_run_are_taken(rng: torch.Generator, options: dict[str, Any]) -> None:
    owner = experts(**options)
    assert bind(owner.quant_method).bound == 1
    given = dispatched(owner, router(), rng, torch.float32)
    with pytest.raises((ValueError, NotImplementedError)):
        owner.quant_method.forward_native(owner, given)
    assert owner.quant_method.apply(owner, given).hidden_states.shape == (7, HIDDEN)


def test_on_cuda_weights_on_the_input_do_not_go_with_a_factor() -> None:
    method = experts(apply_router_weight_on_input=True, routed_scaling_factor=2.5).quant_method
    method._resolve_forward_method = lambda: method.forward_cuda
    assert "routed_scaling_factor to the output" in bind(method).summary()


def set_on(place: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute, below the method or (with a dot in front) below its layer."""

    def change(owner: Any) -> None:
        *path, name = place.removeprefix(".").split(".")
        found = owner if place.startswith(".") else owner.quant_method
        for step in path:
            found = getattr(found, step)
        setattr(found, name, value)

    return change


class Backend:
    value = "deep_gemm"

    def is_triton(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_on("runner.runner_backend", Backend()), "its runner is deep_gemm"),
        (set_on("_aiter_runner", object()), "its runner is aiter"),
        (set_on("runner.lora_enabled", True), "its runner serves LoRA"),
        (set_on(".dispatcher", object()), "its tokens are dispatched by object"),
        (set_on("w13_swiglu_interleaved", True), "its weights have another layout"),
        (set_on("use_flashinfer_cutlass", True), "its weights have another layout"),
        (set_on(".use_intel_amx_backend", True), "its weights are packed for AMX"),
        (set_on("_resolve_forward_method", lambda: experts().quant_method.forward_xpu), "SGLang runs it as forward_xpu"),
        (set_on(".w2_weight", nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 31))), "its weights have shapes"),
        (set_on(".w2_weight", nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 4, 8))), "not [experts, rows, columns]"),
        (set_on(".quant_method", None), "its layer uses another quant_method"),
    ],
)
def test_experts_that_run_another_way_are_left(change: Callable[[Any], None], reason: str) -> None:
    owner = experts()
    method = owner.quant_method
    change(owner)
    report = bind(method)
    assert report.bound == 0 and reason in report.summary()


def test_a_subclass_with_an_apply_of_its_own_is_left() -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    class Sparse(UnquantizedFusedMoEMethod):
        def apply(self, layer: Any, dispatch_output: Any) -> Any:
            return dispatch_output

    method = experts().quant_method
    method.__class__ = Sparse
    assert "Sparse overrides apply" in bind(method).summary()


def test_offloaded_experts_are_left() -> None:
    owner = experts()
    owner.w13_weight = nn.Parameter(owner.w13_weight.to("meta"), requires_grad=False)
    report = bind(owner.quant_method)
    assert report.bound == 0 and "its weights are offloaded" in report.summary()


def test_dispatch_outputs_of_another_kind_go_to_sglang(rng: torch.Generator) -> None:
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput

    owner = experts()
    method = owner.quant_method
    bind(method)
    given = dispatched(owner, router(), rng, torch.float32)
    for other in (given._replace(hidden_states_scale=torch.ones(1)), given._replace(hidden_states_pre_quant=(1, 2))):
        method.apply(owner, other)
    with pytest.raises(ValueError):
        method.apply(owner, StandardDispatchOutput(given.hidden_states, None, (1, 2)))
    assert CALLS == []


def test_experts_of_another_rank_add_nothing(rng: torch.Generator) -> None:
    """What one rank leaves out, the other adds: together they are the whole layer."""
    owner = experts()
    bind(owner.quant_method)
    x, logits = tokens(rng)
    routed = router().forward_native(x, logits)
    whole = owner(x, routed)
    halves = []
    for first in (0, EXPERTS // 2):
        half = experts()
        for name in ("w13_weight", "w2_weight"):
            setattr(half, name, nn.Parameter(getattr(owner, name)[first : first + EXPERTS // 2], requires_grad=False))
        half.moe_runner_config.num_local_experts = EXPERTS // 2
        bind(half.quant_method)
        ids = routed.topk_ids - first
        here = (ids >= 0) & (ids < EXPERTS // 2)
        halves.append(half(x, routed._replace(topk_ids=torch.where(here, ids, -1).int())))
    assert_within("fused_moe", halves[0] + halves[1], whole.double(), whole.double().abs() + 1, roundings=32)


def test_without_tokens() -> None:
    layer, owner = router(), experts()
    bind(layer, owner.quant_method)
    x = torch.zeros(0, HIDDEN)
    assert owner(x, layer(x, torch.zeros(0, EXPERTS))).shape == (0, HIDDEN)
    assert owner(x, layer.empty_topk_output(torch.device("cpu"))).shape == (0, HIDDEN)
    assert CALLS == ["topk", "fused_moe", "fused_moe"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda obj, hidden_states, router_logits, **_: torch.zeros(2, 2), "its result is Tensor, not (topk_weights, topk_ids)"),
        (
            lambda obj, hidden_states, router_logits, **_: (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int32)),
            "its topk_weights has shape",
        ),
        (
            lambda obj, hidden_states, router_logits, **_: (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64)),
            "its topk_ids is torch.int64",
        ),
        (
            lambda obj, hidden_states, router_logits, **_: (torch.zeros(2, 2), torch.tensor([[0, 1], [1, 2]]).int().t()),
            "its topk_ids is not contiguous",
        ),
        (
            lambda obj, hidden_states, router_logits, **_: (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)),
            "[0, 0] are not 2 of 8 experts",
        ),
        (
            lambda obj, hidden_states, router_logits, **_: (torch.zeros(2, 2), torch.tensor([[0, 9], [1, 2]]).int()),
            "[0, 9] are not 2 of 8 experts",
        ),
        (
            lambda obj, hidden_states, router_logits, **_: (torch.zeros(2, 2), torch.tensor([[0, 1], [1, 2]]).int()),
            "of a padded token are not -1",
        ),
    ],
)
def test_the_trial_of_routing_sees_what_is_wrong(wrong: Callable[..., Any], told: str, caplog: pytest.LogCaptureFixture) -> None:
    block = nn.ModuleDict({"topk": router(), "experts": experts()})
    report = bind_block(block, topk=wrong)
    assert report.bound == 1, report.summary()
    assert told in caplog.text


def bind_block(block: nn.Module, **wrong: Callable[..., Any]) -> Any:
    given = {op: wrong.get(op) or getattr(reference, op) for op in ("topk", "fused_moe")}
    binder = Binder(manager_of(*(OpImpl(op, "reference.torch", BackendImplKind.REFERENCE, fn) for op, fn in given.items())))
    block.test_keeps_alive = binder  # type: ignore[assignment]
    return binder.bind(Model(block), Load())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda obj, layer, dispatch_output: dispatch_output, "its result is StandardDispatchOutput, not a tensor"),
        (lambda obj, layer, dispatch_output: dispatch_output.hidden_states[:1], "its result has shape (1, 64), not (2, 64)"),
        (lambda obj, layer, dispatch_output: dispatch_output.hidden_states * torch.nan, "its result contains inf or nan"),
    ],
)
def test_the_trial_of_experts_sees_what_is_wrong(wrong: Callable[..., Any], told: str, caplog: pytest.LogCaptureFixture) -> None:
    assert bind(experts().quant_method, fused_moe=wrong).bound == 0
    assert told in caplog.text


def test_the_results_of_flagos_vendors_are_taken(rng: torch.Generator) -> None:
    """StandardTopKOutput and StandardCombineInput."""
    x, logits = tokens(rng)
    layer, owner = router(), experts()
    assert bind_block(nn.ModuleDict({"topk": layer, "experts": owner})).bound == 2
    wanted = owner(x, layer(x, logits))
    report = bind_block(nn.ModuleDict({"topk": layer, "experts": owner}), topk=field_backend.topk, fused_moe=field_backend.fused_moe)
    assert report.bound == 2, report.summary()
    assert torch.equal(owner(x, layer(x, logits)), wanted)


@pytest.mark.parametrize("op", ["topk", "fused_moe"])
def test_an_implementation_that_fails_in_service_is_retried_elsewhere(
    rng: torch.Generator, op: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What takes over, another implementation or SGLang, gets the same call, and the layer's result has SGLang's form."""
    state = SimpleNamespace(broken=False)

    def sometimes(*args: Any, **named: Any) -> Any:
        if state.broken:
            raise RuntimeError("out of order")
        return getattr(reference, op)(*args, **named)

    for successor in (True, False):
        impls = [OpImpl(op, "vendor.sometimes", BackendImplKind.VENDOR, sometimes, vendor="x", writes_inputs=False)]
        if successor:
            impls.append(OpImpl(op, "reference.torch", BackendImplKind.REFERENCE, getattr(reference, op), writes_inputs=False))
        set_global_policy(SelectionPolicy("vendor", per_op_order=((op, ("vendor", "reference", "sglang")),)))
        binder = Binder(manager_of(*impls))
        layer, owner = router(), experts()
        state.broken = False
        assert binder.bind(Model(nn.ModuleDict({"topk": layer, "experts": owner})), Load()).bound == 1
        x, logits = tokens(rng)
        wanted = owner(x, layer(x, logits))
        state.broken = True
        got = owner(x, layer(x, logits, num_token_non_padded=torch.tensor([len(x)])))
        assert_within("both", got, wanted.double(), wanted.double().abs() + 1, roundings=32)
        assert "out of order" in caplog.text


def test_a_policy_context_reaches_both(rng: torch.Generator) -> None:
    layer, owner = router(), experts()
    bind(layer, owner.quant_method)
    x, logits = tokens(rng)
    with policy_context(SelectionPolicy("reference", per_op_order=(("topk", ("sglang",)),))):
        owner(x, layer(x, logits))
    assert CALLS == ["fused_moe"]
    with with_preference("reference"):
        owner(x, layer(x, logits))
    assert CALLS == ["fused_moe", "topk", "fused_moe"]


def test_a_context_reaches_experts_that_are_left_to_sglang(rng: torch.Generator) -> None:
    """SGLang calls their forward with ``layer=``."""
    set_global_policy(SelectionPolicy("reference", per_op_order=(("fused_moe", ("sglang",)),)))
    layer, owner = router(), experts()
    bind(layer, owner.quant_method)
    x, logits = tokens(rng)
    own = owner(x, layer(x, logits))
    assert CALLS == ["topk"]
    with policy_context(SelectionPolicy("reference", per_op_order=(("fused_moe", ("sglang",)),))):
        assert torch.equal(owner(x, layer(x, logits)), own)
    assert "fused_moe" not in CALLS
    with policy_context(SelectionPolicy("reference")):
        torch.testing.assert_close(owner(x, layer(x, logits)), own)
    assert "fused_moe" in CALLS


def logits_halved(obj: Any, hidden_states: Any, router_logits: Any, **named: Any) -> Any:
    return reference.topk(obj, hidden_states, router_logits / 2, **named)


def test_a_wrong_router_does_not_agree(rng: torch.Generator) -> None:
    layer = router()
    assert bind(layer, topk=logits_halved).bound == 1
    x, logits = tokens(rng)
    native = by_expert(layer.forward_native(x, logits)).double()
    with pytest.raises(AssertionError):
        assert_within("topk", by_expert(layer(x, logits)), native, native, roundings=32)
