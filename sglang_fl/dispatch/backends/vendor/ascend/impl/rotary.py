# SPDX-License-Identifier: Apache-2.0
import torch
import torch_npu

from ....cos_sin import joined

#: npu_mrope's widths come in these steps, by the bytes of a number.
_STEP = {2: 32, 4: 16}
#: No sections: positions are one row, and npu_mrope is a plain rotary embedding.
_NO_SECTIONS = [0, 0, 0]


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    interleaved: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch_npu's operators give new tensors, whatever is allowed."""
    if not query.shape[0]:
        return query, key
    rotary_dim = 2 * cos.shape[-1]
    mode = "interleave" if interleaved else "half"
    if cos.dtype == query.dtype and rotary_dim % _STEP[query.itemsize] == 0:
        head_dim = query.shape[-1]
        rotated = torch_npu.npu_mrope(
            position_ids,
            query.reshape(query.shape[0], -1),
            key.reshape(key.shape[0], -1),
            joined(cos, sin),
            head_dim,
            mrope_section=_NO_SECTIONS,
            rotary_mode=mode,
        )
        return rotated[0].view(query.shape), rotated[1].view(key.shape)
    rows_cos, rows_sin = (_rows(x, position_ids, interleaved) for x in (cos, sin))
    return _rotate(query, rows_cos, rows_sin, mode), _rotate(key, rows_cos, rows_sin, mode)


def _rows(x: torch.Tensor, position_ids: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``[1, num_tokens, 1, rotary_dim]`` in fp32, each number of ``x`` where npu_rotary_mul needs it twice."""
    rows = x.index_select(0, position_ids).float()
    twice = rows.repeat_interleave(2, dim=-1) if interleaved else torch.cat((rows, rows), dim=-1)
    return twice[None, :, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    """npu_rotary_mul rounds what it multiplies with to x's dtype, so it is given fp32."""
    rotary_dim = cos.shape[-1]
    rotated = torch_npu.npu_rotary_mul(x[None, ..., :rotary_dim].float(), cos, sin, mode)[0].to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
