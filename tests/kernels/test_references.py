# SPDX-License-Identifier: Apache-2.0
"""The references of SGLang's kernels pass ``sglang-fl check``."""

import pytest
import torch
from accuracy import check_cases
from backend_functions import reference_of

from sglang_fl.check.cases import OPERATORS_CHECKED
from sglang_fl.check.constants import INPUTS, SERVING, SIZES, SPECIAL, UNUSUAL
from sglang_fl.dispatch.kernel_implementations import is_kernel
from sglang_fl.kernels.reference import REFERENCES
from sglang_fl.kernels.reference.gates import fused_sigmoid_mul


def test_check_has_cases_of_every_reference() -> None:
    assert set(filter(is_kernel, OPERATORS_CHECKED)) == set(REFERENCES)


#: Operators whose references replace Triton kernels of SGLang's too.
OPERATORS = ("fused_sigmoid_gating_delta_rule_update", "causal_conv1d_fn", "causal_conv1d_update")


@pytest.mark.parametrize("target", [*REFERENCES, *OPERATORS])
def test_a_reference(target: str) -> None:
    check_cases(target, reference_of(target), SERVING, SIZES, UNUSUAL, SPECIAL, INPUTS)


def test_what_it_has_no_word_for_is_refused() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(NotImplementedError, match="does not quantise"):
        fused_sigmoid_mul(x, x, quant=True)
