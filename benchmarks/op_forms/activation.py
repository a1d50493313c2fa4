# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import torch

from .form import Form, Forms, Tensors, nbytes


def silu_and_mul(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.activation import SiluAndMul

    size = 3 * hidden

    def inputs(tokens: int) -> Tensors:
        return (torch.randn(tokens, 2 * size, dtype=dtype, device=device),)

    yield Form("", SiluAndMul, inputs, lambda tensors: nbytes(*tensors) * 3 // 2, size)


FORMS: dict[str, Forms] = {"silu_and_mul": silu_and_mul}
