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
COVERED: dict[str, list[dict[str, str]]] = {
    **dict.fromkeys(("gelu_and_mul", "new_gelu", "quick_gelu", "relu2", "silu_and_mul"), WIDTHS),
    **dict.fromkeys(("rms_norm", "gemma_rms_norm", "layer_norm"), NORMS),
    **dict.fromkeys(("rotary_embedding", "mrotary_embedding"), HEADS),
    **{op: DELTA for op in OPERATORS_CHECKED if "gated_delta_rule" in op},
    "topk": [{"experts": "experts", "top_k": "top_k"}],
    "fused_moe": [{"experts": "experts", "top_k": "top_k"}, {"hidden": "hidden"}, {"size": "moe_width"}],
}


def test_the_table_is_that_of_the_installed_classes() -> None:
    """``python tests/check/model_sizes.py > sglang_fl/check/cases/models.json`` makes it anew."""
    assert json.loads(FILE.read_text(encoding="utf-8")) == table()
    assert {model["model"].partition(":")[0] for model in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("op", COVERED)
def test_an_operators_cases_have_every_models_sizes(op: str) -> None:
    forms: list[Any] = [case.make for case in cases_of(op, None, torch.device("cpu"), quick=True) if isinstance(case.make, Form)]
    missing = [
        (model["model"], names)
        for model in MODELS
        for names in COVERED[op]
        if set(names.values()) <= set(model)
        and not any(all(getattr(form, word) == model[name] for word, name in names.items()) for form in forms)
    ]
    assert missing == []
