# SPDX-License-Identifier: Apache-2.0
"""The kinds of mistakes that users reported of kernels, planted into the reference of any operator where they can occur.

``make test-check-grid`` holds every kind on every operator against ``sglang-fl check --quick``'s cases, and prints as JSON which case
caught it.
"""

import json
import secrets
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from backend_functions import reference

from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.cases.call import INT32
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import FAILED, GRAPH, INPUTS, REPEATS, SERVING, SIZES, SPECIAL, THREADS, UNUSUAL, case_matches, case_name
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch.kernel_implementations import is_kernel

CPU = torch.device("cpu")
CHECKS = frozenset({SERVING, SIZES, UNUSUAL, SPECIAL, INPUTS, REPEATS, THREADS, GRAPH})
Function = Callable[..., Any]

DELTA = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
DECODE = "fused_recurrent_gated_delta_rule_packed_decode"
UPDATE = "fused_sigmoid_gating_delta_rule_update"
CONVOLUTION, NEXT_CONVOLUTION = "causal_conv1d_fn", "causal_conv1d_update"
ROTARY = ("rotary_embedding", "mrotary_embedding")
#: The places of a pool of states and of its slots in the arguments.
POOLS = {DELTA[0]: (6, 7), DECODE: (6, 8), UPDATE: (9, 10), CONVOLUTION: (3, 6), NEXT_CONVOLUTION: (1, 5)}
#: The place of the bias in the arguments of operators without a layer.
BIASES = {DECODE: 4, UPDATE: 2, CONVOLUTION: 2, NEXT_CONVOLUTION: 3}


#: The tensors of a call whose numbers an operator computes with, if they are not its second argument.
ACTIVATIONS: dict[str, Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]]] = {
    "topk": lambda args: args[2:3],
    "fused_moe": lambda args: (args[2].hidden_states,),
    "rotary_embedding": lambda args: args[1:3],
    "mrotary_embedding": lambda args: args[2:4],
    DELTA[0]: lambda args: args[:3],
    DELTA[1]: lambda args: tuple(x for x in (*args[:3], args[6]) if x is not None),
    DECODE: lambda args: args[:1],
    UPDATE: lambda args: tuple(x[0] for x in args[5:8]),
    CONVOLUTION: lambda args: (args[0].T,),
    NEXT_CONVOLUTION: lambda args: args[:1],
}


def activations(op: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Rows, tokens or sequences come first in those of the first."""
    return ACTIVATIONS.get(op, lambda args: args[1:2])(args)


def rows(op: str, args: tuple[Any, ...], got: Any) -> torch.Tensor:
    """What a call wrote, rows first: a token, a head of a token, or a channel of a sequence."""
    result = got[0] if isinstance(got, tuple) else got
    if op == CONVOLUTION:
        return result.T
    if op == NEXT_CONVOLUTION:
        return result.view(-1, *result.shape[2:])
    by_row = result.is_contiguous() and (op not in ROTARY or result.dim() == 3)
    return result.view(-1, result.shape[-1]) if by_row else result


def heads(op: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """The heads of the query and of the key; 0 where there are none."""
    first = activations(op, args)
    if op == "mrotary_embedding":
        return tuple(x.flatten(1).shape[1] // args[0].head_size if len(x) else 0 for x in first)  # type: ignore[return-value]
    if op == DECODE:
        _, value_heads, value_dim, key_dim = args[6].shape
        return value_heads, (args[0].shape[1] - value_heads * value_dim) // (2 * key_dim)
    if op in (*DELTA, UPDATE):
        return first[2].shape[-2], first[1].shape[-2]
    return (first[0].shape[1], first[-1].shape[1]) if first[0].dim() == 3 else (0, 0)


def spoiled(part: torch.Tensor) -> None:
    part.copy_(part * 1.25 + 1)


def where(condition: Callable[[str, tuple[Any, ...]], bool]) -> Callable[[str], Function]:
    """The last row of a call is wrong where the condition holds."""

    def plant(op: str) -> Function:
        right = getattr(reference, op)

        def fn(*args: Any, **named: Any) -> Any:
            holds = condition(op, args)
            got = right(*args, **named)
            written = rows(op, args, got)
            if holds and len(written):
                spoiled(written[-1:])
            return got

        return fn

    return plant


def from_row(first: int) -> Callable[[str], Function]:
    def plant(op: str) -> Function:
        right = getattr(reference, op)

        def fn(*args: Any, **named: Any) -> Any:
            got = right(*args, **named)
            spoiled(rows(op, args, got)[first:])
            return got

        return fn

    return plant


def key_heads_beyond(most: int) -> Callable[[str], Function]:
    """They keep what they had, as with a grid that was made for fewer."""

    def plant(op: str) -> Function:
        right = getattr(reference, op)

        def fn(*args: Any) -> Any:
            key = activations(op, args)[1]
            size = args[0].head_size if op == "mrotary_embedding" else key.shape[-1]
            kept = key.clone()
            query, got = right(*args)
            if len(kept):
                got.view(len(got), -1)[:, most * size :] = kept.flatten(1)[:, most * size :]
            return query, got

        return fn

    return plant


def at_the_second_call(op: str) -> Function:
    """With the same shapes."""
    right, seen = getattr(reference, op), dict[Any, int]()

    def fn(*args: Any, **named: Any) -> Any:
        key = tuple((x.shape, x.dtype) for x in activations(op, args))
        seen[key] = seen.get(key, 0) + 1
        got = right(*args, **named)
        if seen[key] % 5 == 2 and len(rows(op, args, got)):
            spoiled(rows(op, args, got)[-1:])
        return got

    return fn


def race(op: str) -> Function:
    """Two blocks write the row in the middle, and which comes last is chance."""
    right = getattr(reference, op)

    def fn(*args: Any, **named: Any) -> Any:
        got = right(*args, **named)
        written = rows(op, args, got)
        middle = len(written) // 2
        if middle and secrets.randbelow(4) == 0:
            spoiled(written[middle : middle + 1])
        return got

    return fn


def top_k_beyond_8(op: str) -> Function:
    def topk(*args: Any, **named: Any) -> Any:
        weights, ids = reference.topk(*args, **named)
        return torch.cat((weights[:, :8], weights[:, 8:] * 0.5), -1), ids

    def fused_moe(obj: Any, layer: Any, given: Any) -> Any:
        output = given.topk_output
        first = SimpleNamespace(topk_weights=output.topk_weights[:, :8], topk_ids=output.topk_ids[:, :8])
        return reference.fused_moe(obj, layer, SimpleNamespace(hidden_states=given.hidden_states, topk_output=first))

    return topk if op == "topk" else fused_moe


def padding_of_a_long_batch(op: str) -> Function:
    """It is taken for tokens."""

    def fn(obj: Any, x: Any, logits: Any, *, num_token_non_padded: Any, **named: Any) -> Any:
        real = num_token_non_padded if len(logits) <= 64 else None
        return reference.topk(obj, x, logits, num_token_non_padded=real, **named)

    return fn


def odd_and_many(op: str, args: tuple[Any, ...]) -> bool:
    """More rows than a block has, of a width that is no multiple of 8."""
    return args[1].dim() == 2 and len(args[1]) > 64 and args[1].shape[1] % 8 != 0


def experts_behind_one_without_tokens(op: str) -> Function:
    """They are taken for the one before."""

    def fn(obj: Any, layer: Any, given: Any) -> Any:
        ids = given.topk_output.topk_ids.long()
        counts = torch.bincount(ids[ids >= 0], minlength=layer.w13_weight.shape[0])
        moved = (counts == 0).cumsum(0)
        wrong = torch.where(ids >= 0, ids - moved[ids.clamp(min=0)].clamp(max=1), ids)
        output = SimpleNamespace(topk_weights=given.topk_output.topk_weights, topk_ids=wrong.clamp(min=-1))
        return reference.fused_moe(obj, layer, SimpleNamespace(hidden_states=given.hidden_states, topk_output=output))

    return fn


def eps_in_bf16(op: str) -> Function:
    def fn(layer: Any, *args: Any) -> Any:
        eps = float(torch.tensor(layer.variance_epsilon).bfloat16())
        return getattr(reference, op)(SimpleNamespace(weight=layer.weight, bias=layer.bias, variance_epsilon=eps), *args)

    return fn


def eps_of_the_layer_forgotten(op: str) -> Function:
    """By the kernel that adds a residual."""

    def fn(layer: Any, x: Any, residual: Any = None) -> Any:
        eps = layer.variance_epsilon if residual is None else 1e-6
        return getattr(reference, op)(SimpleNamespace(weight=layer.weight, variance_epsilon=eps), x, residual)

    return fn


def strides_differ(op: str, args: tuple[Any, ...]) -> bool:
    """Those of x and of the residual."""
    return len(args) > 2 and args[1].stride() != args[2].stride()


def bias_forgotten(op: str) -> Function:
    def layer_norm(layer: Any, x: Any) -> Any:
        bias = torch.zeros_like(layer.bias)
        return reference.layer_norm(SimpleNamespace(weight=layer.weight, bias=bias, variance_epsilon=layer.variance_epsilon), x)

    def topk(obj: Any, *args: Any, **named: Any) -> Any:
        config = SimpleNamespace(**{**vars(obj.topk_config), "correction_bias": None})
        return reference.topk(SimpleNamespace(topk_config=config), *args, **named)

    def fused_moe(obj: Any, layer: Any, given: Any) -> Any:
        names = ("w13_weight", "w2_weight", "moe_runner_config")
        return reference.fused_moe(obj, SimpleNamespace(**{name: getattr(layer, name) for name in names}), given)

    def without_layer(*args: Any) -> Any:
        place = BIASES[op]
        bias = None if args[place] is None else torch.zeros_like(args[place])
        return getattr(reference, op)(*args[:place], bias, *args[place + 1 :])

    return {"layer_norm": layer_norm, "topk": topk, "fused_moe": fused_moe}.get(op, without_layer)


def rotary_scale_forgotten(op: str) -> Function:
    def rotary(layer: Any, query: Any, key: Any, cos: Any, sin: Any, *more: Any) -> Any:
        size = (cos.float().square() + sin.float().square()).sqrt()
        return reference.rotary_embedding(layer, query, key, cos / size, sin / size, *more)

    def mrotary(layer: Any, *args: Any) -> Any:
        cos, sin = layer.cos_sin_cache.float().chunk(2, -1)
        size = (cos.square() + sin.square()).sqrt()
        names = ("head_size", "is_neox_style", "mrope_section", "mrope_interleaved", "axis_map")
        same = {name: getattr(layer, name) for name in names}
        return reference.mrotary_embedding(SimpleNamespace(**same, cos_sin_cache=torch.cat((cos / size, sin / size), -1)), *args)

    return rotary if op == "rotary_embedding" else mrotary


def rotary_scale_forgotten_of_interleaved(op: str) -> Function:
    right, wrong = getattr(reference, op), rotary_scale_forgotten(op)

    def fn(layer: Any, *args: Any) -> Any:
        interleaved = args[5] if op == "rotary_embedding" else not layer.is_neox_style
        return (wrong if interleaved else right)(layer, *args)

    return fn


def positions_read_as_if_contiguous(op: str) -> Function:
    right, place = getattr(reference, op), 5 if op == "rotary_embedding" else 1

    def fn(*args: Any) -> Any:
        return right(*args[:place], as_if_contiguous(args[place]), *args[place + 1 :])

    return fn


def logits_of_sigmoids_read_as_if_contiguous(op: str) -> Function:
    def topk(obj: Any, x: Any, logits: Any, **named: Any) -> Any:
        read = as_if_contiguous(logits) if obj.topk_config.scoring_func == "sigmoid" else logits
        return reference.topk(obj, x, read, **named)

    return topk


def as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def _is_in_the_middle(op: str, args: tuple[Any, ...]) -> bool:
    """More rows than a small batch has, and fewer than a large one."""
    x = activations(op, args)[0]
    return 1024 < (len(x) if op in ROTARY else x.numel() // x.shape[-1]) < 4096


def _is_far(op: str, args: tuple[Any, ...]) -> bool:
    """The last row, or the last slot that a sequence has."""
    last = [(x, len(x) - 1) for x in activations(op, args)]
    if op in POOLS:
        pool, slots = (args[place] for place in POOLS[op])
        if slots is not None and len(slots):
            last.append((pool, int(slots.max())))
    return any(index * x.stride(0) >= INT32 for x, index in last)


ALL = tuple(op for op in OPERATORS_CHECKED if not is_kernel(op))
ROWS = tuple(op for op in ALL if op not in DELTA)
DENSE = ("silu_and_mul", "gelu_and_mul", "new_gelu", "quick_gelu", "rms_norm", "gemma_rms_norm", "layer_norm", *ROTARY)
#: kind -> (what plants it, the operators where it can occur, the first being the one of the everyday test)
KINDS: dict[str, tuple[Callable[[str], Function], tuple[str, ...]]] = {
    "key heads beyond 8 left alone": (key_heads_beyond(8), ROTARY),
    "key heads beyond 16 left alone": (key_heads_beyond(16), ROTARY),
    "wrong from row 4096 on": (from_row(4096), ("rms_norm", "topk", *ROWS)),
    "wrong from row 65535 on": (from_row(65535), ("silu_and_mul", "layer_norm", *ROWS)),
    "wrong from row 65536 on": (from_row(65536), ("topk", "rotary_embedding", *ROWS)),
    "a grid's second dimension beyond 65535": (from_row(65535), (DECODE, *ROWS)),
    "an offset beyond 32 bits": (where(_is_far), ("silu_and_mul", *ALL)),
    "odd numbers of heads": (
        where(lambda op, args: heads(op, args)[0] % 2 == 1),
        ("rotary_embedding", "mrotary_embedding", "rms_norm", DECODE, *DELTA, UPDATE),
    ),
    "more than 8 tokens": (where(lambda op, args: len(activations(op, args)[0]) > 8), ("gelu_and_mul", *ROWS)),
    "the second call": (at_the_second_call, ("relu2", *ALL)),
    "a tensor that is a view": (
        where(lambda op, args: not all(x.is_contiguous() for x in activations(op, args))),
        ("gemma_rms_norm", *ALL),
    ),
    "top-k of 9 and more": (top_k_beyond_8, ("topk", "fused_moe")),
    "padding of a long batch": (padding_of_a_long_batch, ("topk",)),
    "an odd width of many rows": (where(odd_and_many), ("silu_and_mul", "rms_norm", "gemma_rms_norm", "layer_norm")),
    "an expert without tokens": (experts_behind_one_without_tokens, ("fused_moe",)),
    "epsilon in another dtype": (eps_in_bf16, ("rms_norm", "gemma_rms_norm", "layer_norm")),
    "epsilon with a residual": (eps_of_the_layer_forgotten, ("rms_norm", "gemma_rms_norm")),
    "a residual with strides of its own": (where(strides_differ), ("gemma_rms_norm", "rms_norm")),
    "bias": (bias_forgotten, ("fused_moe", "layer_norm", "topk", *BIASES)),
    "the rotary embedding's scale": (rotary_scale_forgotten, ROTARY),
    "the rotary embedding's scale, interleaved": (rotary_scale_forgotten_of_interleaved, ROTARY),
    "positions that lie apart": (positions_read_as_if_contiguous, ROTARY),
    "logits of sigmoids that are a view": (logits_of_sigmoids_read_as_if_contiguous, ("topk",)),
    "more than 1024 rows, and fewer than 4096": (where(_is_in_the_middle), ("relu2", "fused_moe", *DENSE)),
    "a race of two blocks": (race, ("silu_and_mul", *ROWS)),
}


def caught(kind: str, op: str) -> str | None:
    """The first case of a quick check that a planted mistake fails; None: it passes."""
    checks = frozenset({REPEATS}) if kind == "a race of two blocks" else CHECKS
    return first_failure(op, KINDS[kind][0](op), checks)


def first_failure(op: str, fn: Function, checks: frozenset[str] = CHECKS) -> str | None:
    """The first case of a quick check, of these kinds, that an implementation fails. None if it passes."""
    seed = secrets.randbits(31)
    impl = Implementation(op, fn, None, CPU)
    cases = [case for case in cases_of(op, None, CPU, quick=True) if case.check in checks]
    # Where models' sizes and rare calls are comes first: what is left would find it later.
    cases.sort(key=lambda case: not case_matches(case_name(op, case.check, case.name, case.dtype), "sizes"))
    for case in cases:
        if check_case(impl, case, seed).status == FAILED:
            return case_name(op, case.check, case.name, case.dtype)
    return None


def grid() -> dict[str, dict[str, str | None]]:
    torch.set_num_threads(1)
    return {kind: {op: caught(kind, op) for op in dict.fromkeys(ops)} for kind, (_, ops) in KINDS.items()}


if __name__ == "__main__":
    json.dump(grid(), sys.stdout, indent=1)
    print()
