# SPDX-License-Identifier: Apache-2.0
"""The forms in which each operator is measured, a file a family."""

from collections.abc import Mapping

from . import activation, gated_delta_rule, moe, normalization, rotary
from .form import Form, Forms, Tensors

__all__ = ["FORMS", "Form", "Tensors"]

#: operator -> its forms at a hidden size.
FORMS: Mapping[str, Forms] = {
    **activation.FORMS,
    **gated_delta_rule.FORMS,
    **moe.FORMS,
    **normalization.FORMS,
    **rotary.FORMS,
}
