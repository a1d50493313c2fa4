# SPDX-License-Identifier: Apache-2.0
"""Functions whose parameters stand in another order than the operator's, or do not fit it."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e import field_backend

from sglang_fl.dispatch import OPERATORS, BackendImplKind, OpImpl, OpManager, OpRegistry
from sglang_fl.dispatch.signature import fitted, parameters_of
from sglang_fl.dispatch.types import LazyFunction, Refusal

V = BackendImplKind.VENDOR


def chunk(q, k, v, g, beta, scale, initial_state, initial_state_indices, cu_seqlens, head_first, use_qk_l2norm_in_kernel):  # type: ignore[no-untyped-def]
    return locals()


def topk(obj, hidden_states, router_logits, num_token_non_padded, expert_location_dispatch_info):  # type: ignore[no-untyped-def]
    return locals()


def in_place_by_default(obj, query, key, cos, sin, position_ids, rotary_interleaved=True, inplace=False):  # type: ignore[no-untyped-def]
    return locals()


@pytest.mark.parametrize(
    "function",
    [
        lambda obj, x, residual=None: x,
        lambda layer, x, residual=None: x,
        lambda obj, x, residual=None, eps=1e-6: x,
        lambda obj, x, residual=None, **more: x,
        lambda obj, /, x, residual=None: x,
        lambda obj, x, *more: x,
        lambda *everything: everything[1],
    ],
)
def test_a_function_in_the_operators_order_is_called_as_it_is(function: Callable[..., Any]) -> None:
    assert fitted("rms_norm", function) is function


def test_each_argument_reaches_the_parameter_of_its_name() -> None:
    for function in (
        lambda layer, residual, x: (layer, x, residual),
        lambda obj, *, x, residual: (obj, x, residual),
        lambda obj, x, /, residual=None: (obj, x, residual),
        lambda obj, residual, x, /: (obj, x, residual),
    ):
        for call in (fitted("rms_norm", function), OpImpl("rms_norm", "vendor.x", V, function, vendor="x").function):
            assert call("layer", 1) == ("layer", 1, None)
            assert call("layer", 1, 2) == call("layer", 1, residual=2) == call(obj="layer", residual=2, x=1) == ("layer", 1, 2)


def test_what_flagos_passes_and_the_operator_does_not_have() -> None:
    call = fitted("chunk_gated_delta_rule", chunk)
    got = call(*range(9), True)
    assert (got["cu_seqlens"], got["head_first"], got["use_qk_l2norm_in_kernel"]) == (8, False, True)
    with pytest.raises(Refusal, match="no parameter 'inplace_update'"):
        call(*range(9), True, False)
    assert fitted("topk", topk)(1, 2, 3, num_token_non_padded=4)["expert_location_dispatch_info"] is None


def test_what_is_no_function_is_refused_where_it_is_registered() -> None:
    for op in ("rms_norm", "an_operator_of_a_package"):
        with pytest.raises(TypeError, match=rf"{op}: vendor.x: fn is 'm:f', and no function"):
            OpRegistry().register_impl(OpImpl(op, "vendor.x", V, "m:f", vendor="x"))  # type: ignore[arg-type]


def test_a_default_is_the_operators() -> None:
    got = fitted("rotary_embedding", in_place_by_default)(*range(6))
    assert (got["rotary_interleaved"], got["inplace"]) == (False, True)


def test_parameters_that_cannot_be_read_are_given_by_name() -> None:
    assert fitted("rms_norm", lambda **named: named)(1, 2, 3) == {"obj": 1, "x": 2, "residual": 3}
    assert fitted("rms_norm", lambda obj, **named: (obj, named))(1, 2) == (1, {"x": 2, "residual": None})
    assert "inplace_update" not in fitted("chunk_gated_delta_rule", lambda **named: named)(*range(9), True)
    with pytest.raises(TypeError):  # a built-in, which has no parameter of that name: so does its trial
        fitted("silu_and_mul", min)(1, 2)


@pytest.mark.parametrize(
    ("op", "function", "problem"),
    [
        ("rms_norm", lambda obj, x: x, "it has no parameter 'residual'"),
        ("rms_norm", lambda obj, x, resid=None: x, "it has no parameter 'residual'; did you mean 'resid'"),
        ("rms_norm", lambda obj, x, residual, eps: x, "nothing is passed for its parameter 'eps'"),
        ("silu_and_mul", lambda x: x, "it has no parameter 'obj'"),
        ("silu_and_mul", lambda x, *more: x, "it has no parameter 'obj'"),
        ("silu_and_mul", lambda self, obj, x: x, "nothing is passed for its parameter 'self'"),
    ],
)
def test_a_function_that_does_not_fit_is_refused_when_it_is_registered(op: str, function: Callable[..., Any], problem: str) -> None:
    registry = OpRegistry()
    impl = OpImpl(op, "vendor.x", V, function, vendor="x")
    with pytest.raises(TypeError) as refused:
        registry.register_many([OpImpl("relu2", "vendor.x", V, lambda obj, x: x, vendor="x"), impl])
    assert str(refused.value).startswith(f"{op}: vendor.x: its parameters do not fit {op}(") and problem in str(refused.value)
    assert registry.list_operators() == []


def test_a_lazy_function_that_does_not_fit_fails_when_it_is_imported() -> None:
    impl = OpImpl("rms_norm", "vendor.x", V, LazyFunction("operator", "neg"), vendor="x")
    registry = OpRegistry()
    registry.register_impl(impl)
    with pytest.raises(TypeError, match=r"rms_norm: vendor\.x: its parameters do not fit"):
        OpManager(registry).resolve("rms_norm")


def test_an_operator_of_a_package_has_the_parameters_that_it_likes() -> None:
    assert parameters_of("chip_op") is None
    assert fitted("chip_op", max) is max


def test_every_function_of_a_flagos_backend_fits() -> None:
    """Served: tests/e2e/test_hybrid.py and test_qwen3_moe.py."""
    registry = OpRegistry()
    field_backend.register_builtins(registry)
    assert len(registry.list_operators()) == 10
    q, v, g = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 4, 8), -torch.rand(1, 5, 4)
    call = OpManager(registry).resolve("fused_recurrent_gated_delta_rule")
    got = call(q, q.flip(1), v, g, torch.rand(1, 5, 4), 0.3, None, True, None, True)
    assert [x.shape for x in got] == [(1, 5, 4, 8), (1, 4, 8, 8)]


def test_an_adapter_stays_in_its_process() -> None:
    impl = OpImpl("chunk_gated_delta_rule", "vendor.x", V, chunk, vendor="x")
    assert impl.function is not chunk
    copy = pickle.loads(pickle.dumps(impl))
    assert copy == impl and "function" not in vars(copy)


def test_our_own_implementations_are_called_as_they_are() -> None:
    from sglang_fl.dispatch.backends.reference.reference import BACKEND

    for impl in BACKEND.implementations():
        assert impl.op_name in OPERATORS and impl.function is impl.fn.load()  # type: ignore[attr-defined]
