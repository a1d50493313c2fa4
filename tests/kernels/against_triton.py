# SPDX-License-Identifier: Apache-2.0
"""Runs each reference and the kernel of SGLang's that it stands for, in Triton's interpreter, on the same arguments; prints JSON.

For each: the largest difference between their results and between what they wrote, at the size of a result's numbers.
"""

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from triton_on_cpu import interpret

from sglang_fl.kernels.reference import REFERENCES

SIZE, HEADS = 16, 4
#: A module whose function writes its result over its input, which nobody reads again.
OVERWRITES = "sglang.kernels.ops.attention.fla.fused_norm_gate"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def norm_by_group(weight: torch.Tensor) -> Arguments:
    return (), {"x": tensor(6, SIZE), "weight": weight, "bias": None, "z": tensor(6, SIZE), "is_rms_norm": True, "activation": "sigmoid"}


def arguments() -> dict[str, list[Arguments]]:
    """name -> calls; of a launch, the grid first."""
    table, rows = torch.randint(0, 900, (6, 40), dtype=torch.int32), integers(4, 0, 2)
    before, after, last = integers(0, 5, 8), integers(7, 6, 21), integers(-1, 41, 83)
    free, extended = torch.arange(30, 60), int((after - before).sum())
    projections = (tensor(5, 2 * SIZE * 2 + 2 * HEADS * SIZE), tensor(5, 2 * HEADS), 2, HEADS, SIZE, SIZE)
    pool, index = tensor(5, 8, 3), torch.tensor([3, 1, 0], dtype=torch.int32)  # no padding: its rows are left as they were allocated
    starts = torch.tensor([0, 7, 9, 12], dtype=torch.int32)
    continued = {"cache_indices": index, "has_initial_state": torch.tensor([True, False, True])}
    drafts = {"intermediate_conv_window": torch.zeros(4, 4, 8, 3), "intermediate_state_indices": integers(0, 1, 2).int()}
    tree = {"retrieve_next_token": torch.tensor([[1, 3, -1, -1]] * 3), "retrieve_next_sibling": torch.tensor([[-1, 2, -1, -1]] * 3)}
    tree["retrieve_parent_token"] = torch.zeros(3, 4, dtype=torch.int64)
    weight = tensor(8, 4)
    return {
        "alloc_extend_kernel": [((3,), before, after, last, free, torch.zeros(extended, dtype=torch.int64), 4, 4)],
        "alloc_decode_kernel": [((3,), integers(1, 9, 6), integers(0, 47, 12), free, torch.zeros(3, dtype=torch.int64), 4, 4)],
        "get_last_loc_triton": [(table, rows, before)],
        "get_last_loc_triton_safe": [(table, rows, before)],
        "compute_position_triton": [(before, after - before, extended)],
        "assign_req_to_token_pool": [((3,), rows, table, before, after, torch.arange(extended), 40, 4)],
        "create_flashinfer_kv_indices_triton": [
            ((3,), table, rows, integers(3, 0, 9), integers(0, 3, 3, 12), start, torch.zeros(12, dtype=torch.int32), 40)
            for start in (None, integers(1, 2, 5))
        ],
        "create_chunked_prefix_cache_kv_indices": [
            ((3,), table, rows, integers(1, 2, 5), integers(3, 0, 9), integers(0, 3, 3, 12), torch.zeros(12, dtype=torch.int32), 40)
        ],
        "murmur_hash32": [],  # SGLang's looks at the device, and takes another way on a CPU
        "softcap_inplace_logits": [],  # libdevice has no form for the interpreter
        "causal_conv1d_fn": [((tensor(12, 8).T, weight, tensor(8), pool, starts, [7, 2, 3]), continued)],
        "causal_conv1d_update": [
            ((tensor(3, 8), pool, weight, tensor(8), "silu"), {"conv_state_indices": index}),
            ((tensor(3, 8, 4), pool, weight, None, "silu"), {"conv_state_indices": index, **drafts}),
            ((tensor(3, 8, 4), pool, weight, None, "silu"), {"conv_state_indices": index, **drafts, **tree}),
        ],
        "fused_qkvzba_split_reshape_cat": [projections],
        "fused_qkvzba_split_reshape_cat_contiguous": [projections],
        "fused_qkv_split_gdn_prefill": [(tensor(5, 8 * SIZE), 2, 2, HEADS, SIZE, SIZE, SIZE)],
        "fused_gdn_gating": [(tensor(HEADS), tensor(5, HEADS), tensor(5, HEADS), tensor(HEADS))],
        "layernorm_gated:rms_norm_gated": [norm_by_group(tensor(SIZE))],
        "fused_norm_gate:rms_norm_gated": [(tensor(6, SIZE), tensor(6, SIZE), tensor(SIZE), None)],
        "fused_qk_gemma_rmsnorm": [],  # writes fp16 or bf16 only, which the interpreter rounds otherwise
        "fused_qk_gemma_rmsnorm_with_gate": [],
        "fused_sigmoid_mul": [((tensor(5, SIZE), tensor(5, HEADS, SIZE // HEADS)), {"inplace": True})],
        "fused_gate_sigmoid_mul": [(tensor(5, SIZE), tensor(SIZE), tensor(5, SIZE))],
        "fused_gate_sigmoid_mul_add": [(tensor(5, SIZE), tensor(SIZE), tensor(5, SIZE), tensor(5, SIZE))],
    }  # type: ignore[return-value]


def split(call: Any) -> Arguments:
    return call if len(call) == 2 and isinstance(call[1], dict) else (call, {})


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [found for part in parts for found in tensors(part)]


def difference(own: Callable[..., Any], reference: Callable[..., Any], takes_grid: bool, call: Any) -> float:
    args, options = split(call)
    mine, theirs = copy.deepcopy((args, options)), copy.deepcopy((args, options))
    got = reference(*mine[0], **mine[1])
    wanted = own[theirs[0][0]](*theirs[0][1:], **theirs[1]) if takes_grid else own(*theirs[0], **theirs[1])  # type: ignore[index]
    written = (mine, theirs) if own.__module__ != OVERWRITES else ((), ())
    pairs = list(zip(tensors((got, written[0])), tensors((wanted if not takes_grid else None, written[1])), strict=True))
    return max(float(((a.double() - b.double()).abs() / (1 + b.double().abs())).max()) for a, b in pairs if a.numel())


def main() -> None:
    interpret()
    torch.manual_seed(int(sys.argv[1]))
    calls, found = arguments(), {}
    for target, given in REFERENCES.items():
        module, _, name = target.partition(":")
        key = name if name in calls else f"{module.rpartition('.')[2]}:{name}"
        own = getattr(importlib.import_module(module), name) if calls[key] else None
        there, _, function = given.function.partition(":")
        reference = getattr(importlib.import_module(there), function)
        found[target] = [difference(own, reference, given.takes_grid, call) for call in calls[key]]  # type: ignore[arg-type]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
