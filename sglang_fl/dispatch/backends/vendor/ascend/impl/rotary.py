# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import torch_npu

from ....rotary import Rotated, by_axis, joined, mrotary_by

#: npu_mrope's widths come in these steps, by the bytes of a number.
_STEP = {2: 32, 4: 16}
#: No sections: positions are one row, and npu_mrope is a plain rotary embedding.
_NO_SECTIONS = [0, 0, 0]


def rotary_embedding(
    obj: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    rotary_interleaved: bool = False,
    inplace: bool = True,
) -> Rotated:
    """torch_npu's operators give new tensors, whatever is allowed."""
    if not query.shape[0]:
        return query, key
    if _fits_npu_mrope(query, cos):
        return _npu_mrope(query, key, cos, sin, position_ids, rotary_interleaved, _NO_SECTIONS)
    mode = _mode(rotary_interleaved)
    rows_cos, rows_sin = (_rows(x, position_ids, rotary_interleaved) for x in (cos, sin))
    return _rotate(query, rows_cos, rows_sin, mode), _rotate(key, rows_cos, rows_sin, mode)


def _mode(interleaved: bool) -> str:
    return "interleave" if interleaved else "half"


def _fits_npu_mrope(query: torch.Tensor, cos: torch.Tensor) -> bool:
    return cos.dtype == query.dtype and 2 * cos.shape[-1] % _STEP[query.itemsize] == 0


def _npu_mrope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    sections: list[int],
) -> Rotated:
    if not query.shape[0]:
        return query, key
    rotated = torch_npu.npu_mrope(
        positions,
        query.reshape(query.shape[0], -1),
        key.reshape(key.shape[0], -1),
        joined(cos, sin),
        query.shape[-1],
        mrope_section=sections,
        rotary_mode=_mode(interleaved),
    )
    return rotated[0].view(query.shape), rotated[1].view(key.shape)


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


def _by_sections(
    obj: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> Rotated:
    if obj.mrope_interleaved or not _fits_npu_mrope(query, cos):
        return rotary_embedding(obj, query, key, *by_axis(cos, sin, positions, obj.axis_map), not obj.is_neox_style)
    return _npu_mrope(query, key, cos, sin, positions, not obj.is_neox_style, list(obj.mrope_section))


mrotary_embedding = mrotary_by(rotary_embedding, _by_sections)
