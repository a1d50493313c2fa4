# SPDX-License-Identifier: Apache-2.0
"""The forms in which each operator is measured, a file a family. An operator that is missing here is not measured."""

from collections.abc import Mapping

from . import activation, moe, normalization, rotary
from .form import Form, Forms, Tensors

__all__ = ["FORMS", "Form", "Tensors"]

#: operator -> its forms at a hidden size.
FORMS: Mapping[str, Forms] = {**activation.FORMS, **moe.FORMS, **normalization.FORMS, **rotary.FORMS}
