# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from functools import partial

import torch

from .form import Form, Forms, Tensors, nbytes


def rms_norm(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.layernorm import RMSNorm

    weight = hidden * dtype.itemsize

    def inputs(count: int, tokens: int) -> Tensors:
        return tuple(torch.randn(tokens, hidden, dtype=dtype, device=device) for _ in range(count))

    for variant, count in (("", 1), ("residual", 2)):
        layer = partial(RMSNorm, hidden, weight_dtype=dtype)
        yield Form(variant, layer, partial(inputs, count), lambda tensors: 2 * nbytes(*tensors) + weight)


FORMS: dict[str, Forms] = {"rms_norm": rms_norm}
