# SPDX-License-Identifier: Apache-2.0
"""Models' sizes: the table agrees with the installed classes, and each operator is checked with them."""

import json
from typing import Any

import pytest
import torch
from check.model_sizes import FAMILIES, FILE, table

from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.cases.call import Form
from sglang_fl.check.cases.models import MODELS

#: operator -> (words of its form, and a model's words for them) that must stand together in a case.
WIDTHS = [{"width": "width"}, {"width": "moe_width"}]
NORMS = [{"hidden": "hidden"}, {"hidden": "q_lora"}, {"hidden": "kv_lora"}, {"hidden": "head_dim"}]
HEADS = [{word: word for word in ("heads", "kv_heads", "head_dim", "rotary_dim")}]
DELTA = [{"heads": "key_heads", "value_heads": "value_heads", "key_dim": "key_dim", "value_dim": "value_dim"}]
KERNELS = {
    "layernorm_gated:rms_norm_gated": [{"hidden": "value_dim"}],
    "fused_norm_gate:rms_norm_gated": [{"hidden": "value_dim"}],
    "fused_qk_gemma_rmsnorm": [{word: word for word in ("heads", "kv_heads", "head_dim")}],
    "fused_qk_gemma_rmsnorm_with_gate": [{word: word for word in ("heads", "kv_heads", "head_dim")}],
    "fused_sigmoid_mul": [{"heads": "heads", "head_dim": "head_dim"}],
    "fused_gate_sigmoid_mul": [{"width": "hidden"}],
    "fused_gate_sigmoid_mul_add": [{"width": "hidden"}],
    "fused_qkvzba_split_reshape_cat": DELTA,
    "fused_qkvzba_split_reshape_cat_contiguous": DELTA,
    "fused_qkv_split_gdn_prefill": DELTA,
    "fused_gdn_gating": [{"heads": "value_heads"}],
    "softcap_inplace_logits": [{"vocabulary": "vocabulary"}],
    "murmur_hash32": [{"columns": "vocabulary"}],
}
COVERED: dict[str, list[dict[str, str]]] = {
    **dict.fromkeys(("gelu_and_mul", "new_gelu", "quick_gelu", "relu2", "silu_and_mul"), WIDTHS),
    **dict.fromkeys(("rms_norm", "gemma_rms_norm", "layer_norm"), NORMS),
    **dict.fromkeys(("rotary_embedding", "mrotary_embedding"), HEADS),
    **{op: DELTA for op in OPERATORS_CHECKED if "delta_rule" in op},
    **{op: [{"dim": "channels"}] for op in OPERATORS_CHECKED if "causal_conv1d" in op},
    "topk": [{"experts": "experts", "top_k": "top_k"}],
    "fused_moe": [{"experts": "experts", "top_k": "top_k"}, {"hidden": "hidden"}, {"size": "moe_width"}],
    **{op: names for kernel, names in KERNELS.items() for op in OPERATORS_CHECKED if op.endswith((f":{kernel}", f".{kernel}"))},
}
#: Operators on requests and slots of the KV cache, whose calls have no size of a model.
OF_REQUESTS = ("ops.memory", "mem_cache", "kv_indices", "position:")


def test_the_table_is_that_of_the_installed_classes() -> None:
    """``python tests/check/model_sizes.py > sglang_fl/check/cases/models.json`` makes it anew."""
    assert json.loads(FILE.read_text(encoding="utf-8")) == table()
    assert {model["model"].partition(":")[0] for model in MODELS} == set(FAMILIES)


def test_every_operator_with_sizes_of_models_is_here() -> None:
    assert set(COVERED) == {op for op in OPERATORS_CHECKED if not any(words in op for words in OF_REQUESTS)}


@pytest.mark.parametrize("op", ("rotary_embedding", "mrotary_embedding"))
def test_the_longest_context(op: str) -> None:
    longest = max(model.get("positions", 0) for model in MODELS)
    assert any(case.make.positions >= longest for case in cases_of(op, None, torch.device("cpu"), quick=True))  # type: ignore[attr-defined]


def _channels(model: dict[str, Any]) -> dict[str, Any]:
    """A hybrid's sizes, with the channels of its convolution: queries, keys and values."""
    if "key_heads" not in model:
        return model
    return model | {"channels": 2 * model["key_heads"] * model["key_dim"] + model["value_heads"] * model["value_dim"]}


@pytest.mark.parametrize("op", COVERED)
def test_an_operators_cases_have_every_models_sizes(op: str) -> None:
    forms: list[Any] = [case.make for case in cases_of(op, None, torch.device("cpu"), quick=True) if isinstance(case.make, Form)]
    missing = [
        (model["model"], names)
        for model in map(_channels, MODELS)
        for names in COVERED[op]
        if set(names.values()) <= set(model)
        and not any(all(getattr(form, word) == model[name] for word, name in names.items()) for form in forms)
    ]
    assert missing == []
