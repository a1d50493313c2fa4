# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torch_npu with the schemas that the real wheel declares, on CPU tensors.

The wheel is read, never imported: ``npu_native_functions_by_codegen.yaml`` in it has every operator's schema, and
PyTorch refuses a call that the schema would refuse. What they compute is their documentation
(``_op_plugin_docs.py`` in the wheel), with the limits that are stated there.
"""

import re
from pathlib import Path
from types import ModuleType

import torch

from sglang_fl.dispatch.backends.reference import impl as reference

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


def torch_npu(wheel: Path) -> tuple[ModuleType, torch.library.Library]:
    """The module, and the library that keeps its operators registered."""
    library = torch.library.Library("npu", "DEF")
    module = ModuleType("torch_npu")
    for name, schema in declared_schemas(wheel).items():
        library.define(schema)
        library.impl(name, globals()[name], "CPU")
        setattr(module, name, getattr(torch.ops.npu, name))
    return module, library
