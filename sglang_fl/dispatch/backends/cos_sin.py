# SPDX-License-Identifier: Apache-2.0
"""What rotary kernels ask of cos and sin, for the backends that need it. Importing it imports PyTorch."""

import torch

#: Where a cos tensor keeps (its sin tensor, the two as one).
_JOINED = "_sglang_fl_joined"


def joined(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[max_position, rotary_dim]``, cos and sin side by side.

    Nothing is copied where they are the halves of one tensor, as SGLang's are; that view is kept with cos.
    """
    kept = cos.__dict__.get(_JOINED)
    if kept is not None and kept[0] is sin:
        return kept[1]
    half = cos.shape[1]
    if (
        sin.dtype == cos.dtype
        and cos.stride() == sin.stride() == (2 * half, 1)
        and cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr()
        and sin.storage_offset() == cos.storage_offset() + half
    ):
        both = cos.as_strided((cos.shape[0], 2 * half), (2 * half, 1))
        cos.__dict__[_JOINED] = (sin, both)
        return both
    return torch.cat((cos, sin), dim=-1)
