# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: the reference against transformers' own, and the Triton kernels of two backends on a CPU."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flaggems_here import gems
from graphs_on_cpu import Graph, capture
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5 import modeling_qwen3_5 as transformers_own

from sglang_fl.dispatch.backends import state_pool
from sglang_fl.dispatch.backends.reference.impl.gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
)

__all__ = ["gems"]

TESTS = Path(__file__).parents[2]


def drawn(tokens: int, heads: int = 2, groups: int = 2, key_dim: int = 8, value_dim: int = 16, rows: int = 1) -> dict[str, torch.Tensor]:
    q, k = torch.randn(2, rows, tokens, heads, key_dim)
    v = torch.randn(rows, tokens, heads * groups, value_dim)
    g, beta = -torch.rand(rows, tokens, heads * groups), torch.rand(rows, tokens, heads * groups)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta}


def whole(x: dict[str, torch.Tensor], pool: Any = None, slots: Any = None, ends: Any = None, update: bool = True) -> Any:
    return chunk_gated_delta_rule(*x.values(), None, pool, slots, ends, True, update)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 2), (3, 1), (1, 4)])
def test_it_is_what_transformers_computes(heads: int, groups: int) -> None:
    x = drawn(75, heads, groups, rows=2)
    states = torch.randn(2, heads * groups, 16, 8)
    q, k = (x[name].repeat_interleave(groups, 2) for name in ("q", "k"))
    wanted, last = transformers_own.torch_recurrent_gated_delta_rule(
        q, k, x["v"], g=x["g"], beta=x["beta"], initial_state=states.mT, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    pool = states.clone()
    out, _ = whole(x, pool)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool, last.mT, rtol=1e-4, atol=1e-5)
    recurrent, final = fused_recurrent_gated_delta_rule(*x.values(), None, states, True, None, True)
    assert torch.equal(recurrent, out) and final is not None and torch.equal(final, pool)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), seed=st.integers(0, 2**31), data=st.data())
def test_sequences_do_not_see_each_other(lengths: list[int], seed: int, data: st.DataObject) -> None:
    """A batch is what its sequences are alone; a sequence in two parts is what it is whole; padding has no slot."""
    torch.manual_seed(seed)
    x, pool = drawn(sum(lengths)), torch.randn(7, 4, 16, 8)
    slots = data.draw(st.permutations(range(7)))[: len(lengths)]
    padded = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    slots = [-1 if hide else slot for slot, hide in zip(slots, padded, strict=True)]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    together = pool.clone()
    out, chunks = whole(x, together, torch.tensor(slots, dtype=torch.int32), ends)
    alone, alone_out, alone_chunks = pool.clone(), [], []
    for slot, start, end in zip(slots, ends.tolist(), ends.tolist()[1:], strict=False):
        middle = (start + end) // 2
        state = torch.zeros(1, 4, 16, 8) if slot < 0 else alone[slot : slot + 1].clone()
        for part in ((start, middle), (middle, end)):
            some, _ = whole({name: y[:, slice(*part)] for name, y in x.items()}, state)
            alone_out.append(some)
        if slot >= 0:
            alone[slot] = state[0]
        begin = torch.zeros(1, 4, 16, 8) if slot < 0 else pool[slot : slot + 1].clone()
        alone_chunks.append(whole({name: y[:, start:end] for name, y in x.items()}, begin)[1])
    assert torch.equal(out, torch.cat(alone_out, 1))
    assert torch.equal(together, alone)
    assert torch.equal(chunks, torch.cat(alone_chunks, 1))


def test_decoding_goes_on_where_prefill_ended() -> None:
    """Its gates are those of prefill, computed by itself."""
    x, tokens = drawn(9, key_dim=8, value_dim=16), 9
    a, b, A_log, dt_bias = torch.randn(tokens, 4), torch.randn(tokens, 4), torch.randn(4), torch.randn(4)
    x["g"] = (-A_log.exp() * torch.nn.functional.softplus(a + dt_bias)).unsqueeze(0)
    x["beta"] = b.sigmoid().unsqueeze(0)
    wanted, _ = whole(x)
    mixed = torch.cat([x[name][0].flatten(1) for name in ("q", "k", "v")], 1)
    pool, out = torch.randn(3, 4, 16, 8), torch.empty(2, 1, 4, 16)
    pool[2] = 0
    before = pool.clone()
    for token in range(tokens):
        row, gates = mixed[token].expand(2, -1), (a[token].expand(2, -1), b[token].expand(2, -1))
        slots = torch.tensor([2, -1])
        fused_recurrent_gated_delta_rule_packed_decode(row, *gates, A_log, dt_bias, 8**-0.5, pool, out, slots, True)
        torch.testing.assert_close(out[0, 0], wanted[0, token], rtol=1e-4, atol=1e-6)
        assert not out[1].any()
    assert torch.equal(pool[:2], before[:2])


def test_a_graph_of_the_update_holds_no_lengths() -> None:
    """Captured with some sequences, replayed with others; padding behind them."""
    x = drawn(8, key_dim=8, value_dim=16)
    a, b, A_log, dt_bias = torch.randn(8, 4), torch.randn(8, 4), torch.randn(4), torch.randn(4)
    pool, buffer = torch.randn(6, 4, 16, 8), torch.randn(5, 4, 4, 16, 8)

    def update(ends: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, parents: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        first = (A_log, a, dt_bias, 1.0, 20.0, x["q"], x["k"], x["v"], b, states[0], slots, None, True, ends)
        return fused_sigmoid_gating_delta_rule_update(*first, False, states[1], rows, 4, parents)

    calls = [
        [torch.tensor([0, 1, 1, 4, 6]), torch.tensor([0, 3, -1, 5]), torch.tensor([1, 0, 4, -1]), torch.zeros(4, 4, dtype=torch.int64)],
        [torch.tensor([0, 3, 5, 5, 7]), torch.tensor([-1, 2, 4, 1]), torch.tensor([3, -1, 2, 0]), torch.tensor([[0, 0, 1, 1]] * 4)],
    ]
    given, states, graph = [x.clone() for x in calls[0]], [pool.clone(), buffer.clone()], Graph()
    with capture(graph):
        out = update(*given, *states)
    for call in calls[::-1]:
        for tensor, value in zip([*given, *states], [*call, pool, buffer], strict=True):
            tensor.copy_(value)
        graph.replay()
        eager = [pool.clone(), buffer.clone()]
        assert torch.equal(out, update(*call, *eager)) and not out[0, int(call[0][-1]) :].any()
        assert all(map(torch.equal, states, eager))


@pytest.mark.parametrize("batch", [1, 2047, 2048, 4100])
@pytest.mark.parametrize("backend", ["flaggems", "vendor.cuda"])
def test_a_batch_of_more_blocks_than_a_grid_has(gems: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, batch: int) -> None:
    """Both kernels have a block for each head of each sequence, in a dimension of up to 65535."""
    module = importlib.import_module(f"sglang_fl.dispatch.backends.{backend}.impl.gated_delta_rule")

    def packed(*args: Any) -> Any:
        assert len(args[0]) * args[6].shape[1] <= 65535
        return fused_recurrent_gated_delta_rule_packed_decode(*args)

    def recurrent(
        q: Any, k: Any, v: Any, g: Any, beta: Any, scale: float, pool: Any, in_place: bool, ends: Any, slots: Any, *more: Any
    ) -> Any:
        count = len(ends) - 1
        assert count * v.shape[2] <= 65535
        gates = (x[0, :count].unsqueeze(1) for x in (q, k, v, g, beta))
        out, last = fused_recurrent_gated_delta_rule(*gates, scale, state_pool.read(pool, slots, torch.float32), True, None, more[-1])
        state_pool.write(pool, slots, last)
        return out.transpose(0, 1), pool

    if backend == "flaggems":
        monkeypatch.setattr(module, "fused_recurrent_gated_delta_rule_fwd", recurrent)
    else:
        monkeypatch.setattr(module, "_packed_decode", packed)
    mixed, pool = torch.randn(batch, 8 * 2 + 32 * 2), torch.randn(batch + 1, 32, 2, 1)
    gates = torch.randn(batch, 32), torch.randn(batch, 32), torch.randn(32), torch.randn(32)
    slots, wanted = torch.randperm(batch + 1)[:batch], pool.clone()
    out, right = torch.randn(2, batch, 1, 32, 2)
    fused_recurrent_gated_delta_rule_packed_decode(mixed, *gates, 1.0, wanted, right, slots, True)
    got, _ = module.fused_recurrent_gated_delta_rule_packed_decode(mixed, *gates, 1.0, pool, out, slots, True)
    assert got is out
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(pool, wanted)


def test_what_does_not_fit_is_named() -> None:
    x = drawn(4)
    with pytest.raises(ValueError, match="4 heads of v are not a multiple of 3 heads of q and k"):
        whole({**x, "q": torch.randn(1, 4, 3, 8), "k": torch.randn(1, 4, 3, 8)})
    with pytest.raises(ValueError, match="1 slots for 2 sequences"):
        whole(x, torch.randn(3, 4, 16, 8), torch.tensor([0]), torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="all sequences are in one row, and q has 2"):
        whole(drawn(4, rows=2), ends=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"the states are \(3, 4, 16, 8\), not \(1, 4, 16, 8\)"):
        fused_recurrent_gated_delta_rule(*x.values(), None, torch.randn(3, 4, 16, 8), True, None, True)
    pool, gates = torch.randn(3, 4, 16, 8), torch.randn(2, 4)
    for width, out in ((97, torch.empty(2, 1, 4, 16)), (96, torch.empty(2, 4, 16))):
        with pytest.raises(ValueError, match=r"a row of 97 numbers does not hold q, k and v|out is \(2, 4, 16\)"):
            fused_recurrent_gated_delta_rule_packed_decode(
                torch.randn(2, width), gates, gates, gates[0], gates[0], 1.0, pool, out, torch.tensor([0, 1]), True
            )


@pytest.mark.parametrize("slots", [[2, 0], [-1, 1, -1], [-1, -1], []])
def test_a_pool_is_read_and_written_by_slots(slots: list[int]) -> None:
    wide = torch.randn(3, 2, 4)
    before, pool, indices = wide.clone(), wide[:, 0], torch.tensor(slots, dtype=torch.int32)
    states = state_pool.read(pool, indices, torch.float64)
    wanted = [before[slot, 0] if slot >= 0 else torch.zeros(4) for slot in slots]
    assert [row.tolist() for row in states] == [row.tolist() for row in wanted]
    new = torch.randn(len(slots), 4)
    state_pool.write(pool, indices, new)
    for slot in range(3):
        assert torch.equal(pool[slot], new[slots.index(slot)] if slot in slots else before[slot, 0])
    assert torch.equal(wide[:, 1], before[:, 1])


@pytest.fixture(scope="module")
def interpreted() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both at once: the interpreter takes a core and a minute for each."""
    command = [sys.executable, "-W", "ignore", str(TESTS / "triton_on_cpu.py")]
    with contextlib.ExitStack() as stack:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        started = {name: stack.enter_context(subprocess.Popen([*command, name], **pipes)) for name in ("cuda", "flaggems")}
        try:
            yield started
        finally:
            for process in started.values():
                process.kill()


@pytest.mark.parametrize("backend", ["cuda", "flaggems"])
def test_the_kernels_compute_the_same_on_a_cpu(interpreted: dict[str, subprocess.Popen[str]], backend: str) -> None:
    """SGLang's and FlagGems's real Triton kernels, interpreted, behind our calls of them; against float64."""
    out, errors = interpreted[backend].communicate(timeout=600)
    assert interpreted[backend].returncode == 0, errors[-3000:]
    cases = json.loads(out.splitlines()[-1])
    assert len(cases) > 20
    assert [case for case in cases if case[3] != "ok"] == []
