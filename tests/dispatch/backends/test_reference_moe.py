# SPDX-License-Identifier: Apache-2.0
"""The reference's routing and experts against float64, for configurations drawn at random."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backend_functions import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_accuracy import check

from sglang_fl.check.cases.moe import ExpertsForm, RoutingForm
from sglang_fl.dispatch.backends.moe import Experts, Routing
from sglang_fl.dispatch.backends.reference.impl import moe

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def routings(draw: st.DrawFn) -> RoutingForm:
    groups, per_group = draw(st.sampled_from([(1, 16), (4, 8), (8, 4), (3, 7)]))
    kept = draw(st.integers(1, groups))
    tokens, biased = draw(st.integers(0, 12)), draw(st.booleans())
    grouped = groups > 1 or draw(st.booleans())
    scoring = draw(st.sampled_from(["softmax", "sigmoid"])) if grouped or not biased else "sigmoid"
    return RoutingForm(
        tokens=tokens,
        experts=groups * per_group,
        top_k=draw(st.integers(1, kept * per_group)),
        scoring=scoring,
        as_they_are=draw(st.booleans()),
        bias=draw(st.sampled_from(["float32", "bfloat16"])) if biased else "",
        groups=groups if grouped else 0,
        topk_group=kept if grouped else 0,
        shared=draw(st.booleans()),
        factor=draw(st.sampled_from([0.0, 1.0, 2.5])),
        on_output=draw(st.booleans()),
        shared_factor=draw(st.sampled_from([0.0, 0.5])),
        real=draw(st.integers(-1, tokens)),
    )


@settings(max_examples=60)
@given(routings(), DTYPES, st.integers(0, 2**31))
def test_topk(form: RoutingForm, dtype: torch.dtype, seed: int) -> None:
    check("topk", reference.topk, form, dtype, seed=seed)


@settings(max_examples=25)
@given(
    st.builds(
        ExpertsForm,
        tokens=st.integers(0, 12),
        hidden=st.sampled_from([8, 33, 64]),
        size=st.sampled_from([1, 16, 40]),
        experts=st.integers(4, 9),
        top_k=st.integers(1, 4),
        activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu2"]),
        not_gated=st.booleans(),
        bias=st.booleans(),
        elsewhere=st.sampled_from([0.0, 0.5, 1.0]),
        ids=st.sampled_from(["int32", "int64"]),
    ),
    DTYPES,
    st.booleans(),
    st.integers(0, 2**31),
)
def test_fused_moe(form: ExpertsForm, dtype: torch.dtype, asked: bool, seed: int) -> None:
    """By the way of a CPU, and by that of devices which may be capturing a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "can_be_asked", lambda device: asked)
        check("fused_moe", reference.fused_moe, form, dtype, seed=seed)


def test_equal_experts() -> None:
    """Which of them win is open; that they are distinct is not."""
    routing = Routing(4, "softmax", True, 1, 1, 1.0, None)
    weights, ids = moe.route(torch.zeros(3, 16), None, routing, None)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert torch.equal(weights, torch.full((3, 4), 0.25))


def test_scores_that_vanish_make_no_nan() -> None:
    routing = Routing(2, "sigmoid", True, 1, 1, 1.0, None)
    weights, _ = moe.route(torch.full((1, 4), -200.0), torch.arange(4.0), routing, None)
    assert torch.equal(weights, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("routing", "bias", "told"),
    [
        (Routing(2, "tanh", True, 1, 1, 1.0, None), None, "softmax or sigmoid, not 'tanh'"),
        (Routing(2, "softmax", True, 3, 1, 1.0, None), None, "8 experts cannot be divided into 3 equal groups"),
        (Routing(9, "softmax", True, 1, 1, 1.0, None), None, "9 experts are wanted from 1 of 1 groups of 8 experts"),
        (Routing(3, "softmax", True, 4, 1, 1.0, None), None, "3 experts are wanted from 1 of 4 groups"),
        (Routing(2, "softmax", True, 4, 5, 1.0, None), None, "from 5 of 4 groups"),
        (Routing(2, "sigmoid", True, 1, 1, 1.0, None), torch.zeros(7), r"correction_bias has shape \(7,\), not \(8,\)"),
        (Routing(2, "sigmoid", True, 8, 8, 1.0, None), torch.zeros(8), "groups of at least two experts, and these have one"),
    ],
)
def test_a_routing_that_there_is_not(routing: Routing, bias: torch.Tensor | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        moe.route(torch.zeros(2, 8), bias, routing, None)


def test_experts_of_several_places_are_not_taken() -> None:
    with pytest.raises(NotImplementedError, match="replicated experts"):
        reference.topk(None, torch.zeros(1, 4), torch.zeros(1, 4), expert_location_dispatch_info=object())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"w13": torch.zeros(4, 5, 8)}, "it cannot have 5 rows"),
        ({"w2": torch.zeros(4, 8, 6)}, r"w2_weight has shape \(4, 8, 6\), not \(4, 8, 3\)"),
        ({"x": torch.zeros(2, 7)}, r"hidden_states has shape \(2, 7\), not \[num_tokens, 8\]"),
        ({"topk_ids": torch.zeros(2, 3, dtype=torch.int32)}, r"topk_weights \(2, 2\) and topk_ids \(2, 3\)"),
        ({"experts": Experts("swish", True, False)}, "one of silu, gelu, gelu_tanh, relu2, not 'swish'"),
        ({"experts": Experts("silu", True, True), "w13_bias": torch.zeros(4, 6)}, "do not take their weight on the input"),
    ],
)
def test_experts_that_do_not_fit(change: dict[str, Any], told: str) -> None:
    given_to_it = {
        "x": torch.zeros(2, 8),
        "w13": torch.zeros(4, 6, 8),
        "w2": torch.zeros(4, 8, 3),
        "topk_weights": torch.ones(2, 2),
        "topk_ids": torch.zeros(2, 2, dtype=torch.int32),
        "w13_bias": None,
        "w2_bias": None,
        "experts": Experts("silu", True, False),
    }
    with pytest.raises(ValueError, match=told):
        moe.compute(**{**given_to_it, **change})


def test_what_sglang_says_of_routing() -> None:
    config = SimpleNamespace(
        top_k=9,
        scoring_func="softmax",
        renormalize=True,
        correction_bias=torch.zeros(16),
        use_grouped_topk=True,
        num_expert_group=4,
        topk_group=2,
        num_shared_topk_slots=1,
        routed_scaling_factor=2.5,
        apply_routed_scaling_factor_on_output=False,
        fused_shared_experts_scaling_factor=0.5,
    )
    assert Routing.of(config) == Routing(8, "sigmoid", True, 4, 2, 1.0, 0.2)
    config.apply_routed_scaling_factor_on_output = True
    assert Routing.of(config) == Routing(8, "sigmoid", True, 4, 2, 2.5, 0.5)
    config.use_grouped_topk, config.num_shared_topk_slots = False, 0
    assert Routing.of(config) == Routing(9, "softmax", True, 1, 1, 2.5, None)
