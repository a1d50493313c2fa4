# SPDX-License-Identifier: Apache-2.0
"""The forms in which each operator is measured, a file a family."""

from collections.abc import Mapping

from . import activation, moe, normalization, rotary
from .form import Form, Forms, Tensors

__all__ = ["FORMS", "NOT_MEASURED", "Form", "Tensors"]

#: operator -> its forms at a hidden size.
FORMS: Mapping[str, Forms] = {**activation.FORMS, **moe.FORMS, **normalization.FORMS, **rotary.FORMS}

#: Operators that ``ops.py`` does not measure: SGLang calls them as functions, not as layers.
NOT_MEASURED = frozenset(
    {
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "fused_recurrent_gated_delta_rule_packed_decode",
    }
)
