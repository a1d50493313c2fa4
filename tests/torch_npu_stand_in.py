# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torch_npu with the schemas that the real wheel declares, on CPU tensors.

The wheel is read, never imported: ``npu_native_functions_by_codegen.yaml`` in it has every operator's schema, and
PyTorch refuses a call that the schema would refuse. What they compute is their documentation
(``_op_plugin_docs.py`` in the wheel), with the limits that are stated there.
"""

import re
from pathlib import Path
from types import ModuleType

import reference_on_tensors as reference
import torch

_DECLARED = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
_NAMES = (
    "npu_swiglu",
    "npu_geglu",
    "npu_gelu",
    "npu_fast_gelu",
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_gemma_rms_norm",
    "npu_layer_norm_eval",
    "npu_mrope",
    "npu_rotary_mul",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax",
)


def declared_schemas(wheel: Path) -> dict[str, str]:
    """operator -> its schema, as the unpacked wheel declares it."""
    text = (wheel / _DECLARED).read_text(encoding="utf-8")
    found = {name: re.search(rf"func: ({name}\(.*)$", text, re.MULTILINE) for name in _NAMES}
    missing = [name for name, match in found.items() if match is None]
    assert not missing, f"the wheel declares no {missing}"
    return {name: match[1].strip() for name, match in found.items() if match is not None}


def npu_swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    assert dim == -1 and self.shape[-1] % 2 == 0 and self.numel()
    return reference.silu_and_mul(self)


def npu_geglu(self: torch.Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    assert dim == -1 and self.shape[-1] % 2 == 0 and self.numel() and 1 <= self.dim() <= 8 and approximate in (0, 1)
    left, right = self.chunk(2, dim)
    gate, up = (left, right) if activate_left else (right, left)
    kind = "tanh" if approximate else "none"
    gelu = reference.gelu_and_mul(torch.cat((gate, torch.ones_like(gate)), -1), kind)
    return reference.gelu_and_mul(torch.cat((gate, up), -1), kind), gelu


def npu_gelu(self: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    assert self.numel() and approximate == "tanh"
    return reference.new_gelu(self).clone()


def npu_fast_gelu(self: torch.Tensor) -> torch.Tensor:
    assert self.numel()
    return reference.quick_gelu(self)


def npu_gemma_rms_norm(self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing empty, nothing that is not contiguous."""
    assert gamma.dtype == self.dtype and self.numel() and self.is_contiguous() and gamma.is_contiguous()
    rstd = torch.rsqrt(self.float().square().mean(-1, keepdim=True) + epsilon)
    return reference.gemma_rms_norm(self, None, gamma, epsilon).clone(), rstd  # type: ignore[union-attr]


def npu_layer_norm_eval(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    assert normalized_shape == [input.shape[-1]] and input.numel() and weight is not None and bias is not None
    assert weight.dtype == bias.dtype == input.dtype
    return reference.layer_norm(input, weight, bias, eps).clone()


def npu_rms_norm(self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    assert gamma.dtype == self.dtype and self.numel()
    rstd = torch.rsqrt(self.float().square().mean(-1, keepdim=True) + epsilon)
    return reference.rms_norm(self, None, gamma, epsilon).clone(), rstd  # type: ignore[union-attr]


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert x1.shape == x2.shape and x1.dtype == x2.dtype == gamma.dtype and x1.numel()
    normed, total = reference.rms_norm(x1, x2, gamma, epsilon)
    return normed, torch.rsqrt(total.float().square().mean(-1, keepdim=True) + epsilon), total


def npu_mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[torch.Tensor, torch.Tensor]:
    rotary_dim = cos_sin_cache.shape[1]
    assert query.dim() == key.dim() == cos_sin_cache.dim() == 2 and cache_mode == "default"
    assert cos_sin_cache.dtype == query.dtype == key.dtype and rotary_mode in ("half", "interleave")
    assert rotary_dim % (16 if query.dtype == torch.float32 else 32) == 0
    assert mrope_section is not None and len(mrope_section) == 3 and sum(mrope_section) == (positions.dim() - 1) * rotary_dim // 2
    cos, sin = cos_sin_cache.chunk(2, dim=-1)
    by_head = [x.unflatten(-1, (-1, head_size)) for x in (query, key)]
    if positions.dim() == 2:
        assert positions.shape[0] == 3
        # Each section of the angles from its own row of positions.
        parts = [[table[positions[i]] for i, table in enumerate(x.split(mrope_section, -1))] for x in (cos, sin)]
        cos, sin = (torch.cat(part, -1) for part in parts)
        positions = torch.arange(positions.shape[1])
    rotated = reference.rotary_embedding(*by_head, cos, sin, positions, rotary_mode == "interleave")
    return rotated[0].flatten(1).clone(), rotated[1].flatten(1).clone()


def npu_rotary_mul(
    self: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: torch.Tensor | None = None
) -> torch.Tensor:
    assert self.dim() == r1.dim() == r2.dim() == 4 and self.dtype == r1.dtype == r2.dtype and rotate is None
    assert self.shape[-1] < 896 and self.shape[-1] % 2 == 0 and self.shape[0] * self.shape[2] < 1000
    assert r1.shape == r2.shape == (1, self.shape[1], 1, self.shape[-1])
    if rotary_mode == "half":
        first, second = self.chunk(2, -1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-self[..., 1::2], self[..., ::2]), dim=-1).flatten(-2)
    return r1 * self + r2 * turned


def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert x.dim() in (2, 3) and finished is None and 0 < k <= min(x.shape[-1], 1024) and x.numel()
    y, ids = x.float().softmax(-1).topk(k, dim=-1)
    return y.to(x.dtype), ids.to(torch.int32), torch.zeros_like(ids, dtype=torch.int32)


def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    experts = x.shape[1]
    size = experts // group_count
    assert x.dim() == 2 and x.numel() and experts <= 2048 and experts % group_count == 0 and size > 2
    assert -(-size // 32) * 32 * group_count <= 2048 and 1 <= k_group <= group_count and 1 <= k <= size * k_group
    assert bias is None or (bias.shape == (experts,) and bias.dtype == x.dtype)
    assert renorm == 0 and norm_type in (0, 1) and group_select_mode in (0, 1) and input_ids is tid2eid is None
    scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    groups = (scores if bias is None else scores + bias.float()).unflatten(-1, (group_count, size))
    best = groups.topk(2, dim=-1).values.sum(-1) if group_select_mode else groups.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(k_group, dim=-1).indices, True)
    ids = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1).topk(k, dim=-1).indices
    # What it makes of these its text does not say for all cases; nobody may rely on it.
    y = torch.full(ids.shape, torch.nan, dtype=x.dtype)
    return y, ids.to(torch.int32), scores if out_flag else x.new_empty(0, dtype=torch.float32)


def torch_npu(wheel: Path) -> tuple[ModuleType, torch.library.Library]:
    """The module, and the library that keeps its operators registered."""
    library = torch.library.Library("npu", "DEF")
    module = ModuleType("torch_npu")
    for name, schema in declared_schemas(wheel).items():
        library.define(schema)
        library.impl(name, globals()[name], "CPU")
        setattr(module, name, getattr(torch.ops.npu, name))
    return module, library
