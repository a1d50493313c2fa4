# SPDX-License-Identifier: Apache-2.0
"""The references that hybrid models reach: against float64, token by token and head by head."""

import math
import secrets
from collections.abc import Iterator

import pytest
import torch
from accuracy import DTYPES, assert_within

from sglang_fl.kernels.reference import causal_conv1d, gated_delta_net, gates, logits

EPS = 1e-6
#: fp32 roundings of an activation's exponent and its quotient, relative to what goes into it.
GATE = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> torch.Generator:
    """Fresh inputs in every run; the seed of a failing one is in its output."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def silu(x: float) -> float:
    return x * sigmoid(x)


class Convolution:
    """One sequence's, in Python's own floats: its window slides by one token at a time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.double(), bias

    def token(self, window: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of the last token of ``window``, and the sizes of its terms."""
        exact, terms = [], []
        for channel, weights in enumerate(self.weight.tolist()):
            products = [w * float(x[channel]) for w, x in zip(weights, window, strict=True)]
            products += [] if self.bias is None else [float(self.bias[channel])]
            total = math.fsum(products)
            exact.append(silu(total))
            # silu's slope is never above 1.1, and its own roundings are at the size of its argument.
            terms.append(1.1 * sum(map(abs, products)) * (1 + abs(total)))
        return torch.tensor(exact, dtype=torch.float64), torch.tensor(terms, dtype=torch.float64)


LENGTHS = [(5, 1, 7), (2,), (1, 0, 3, 1), ()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_convolution_of_sequences(rng: torch.Generator, lengths: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    channels, slots = 6, 9
    weight, bias = randn(rng, channels, width, dtype=dtype), randn(rng, channels, dtype=dtype) if width == 4 else None
    pool = randn(rng, slots, channels, width + 1, dtype=dtype)  # wider than it must be
    x = randn(rng, sum(lengths) + 2, channels, dtype=dtype).T  # two tokens that belong to nobody
    rows = torch.randperm(slots, generator=rng)[: len(lengths)].to(torch.int32)
    if len(lengths) > 2:
        rows[1] = causal_conv1d.PAD_SLOT_ID
    continues = torch.randint(0, 2, (len(lengths),), generator=rng).bool()
    starts = torch.tensor([sum(lengths[:row]) for row in range(len(lengths) + 1)], dtype=torch.int32)
    wanted_pool, before = pool.clone(), pool.clone()
    exact, terms, counted = torch.zeros(2, 0), torch.zeros(0), []
    rows_of_exact, rows_of_terms = [], []
    for row, length in enumerate(lengths):
        slot = int(rows[row])
        if slot == causal_conv1d.PAD_SLOT_ID or not length:
            continue
        window = [before[slot, :, j] if continues[row] else torch.zeros(channels, dtype=dtype) for j in range(width - 1)]
        for token in range(int(starts[row]), int(starts[row]) + length):
            exact, terms = Convolution(weight, bias).token([*window, x[:, token]])
            window = [*window[1:], x[:, token]]
            rows_of_exact.append(exact)
            rows_of_terms.append(terms)
            counted.append(token)
        for j, column in enumerate(window):
            wanted_pool[slot, :, j] = column
    got = causal_conv1d.causal_conv1d_fn(
        x, weight, bias, pool, starts, list(lengths), cache_indices=rows, has_initial_state=continues, activation="silu"
    )
    assert torch.equal(pool, wanted_pool)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    if counted:
        assert_within("convolution", got.T[counted], torch.stack(rows_of_exact), torch.stack(rows_of_terms), GATE + width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_convolution_of_one_more_token(rng: torch.Generator, batch: int, dtype: torch.dtype) -> None:
    channels, width, slots = 5, 4, 7
    weight, bias = randn(rng, channels, width, dtype=dtype), randn(rng, channels, dtype=dtype)
    pool, x = randn(rng, slots, channels, width - 1, dtype=dtype), randn(rng, batch, channels, dtype=dtype)
    rows = torch.randperm(slots, generator=rng)[:batch].to(torch.int32)
    if batch > 2:
        rows[2] = causal_conv1d.PAD_SLOT_ID
    wanted_pool, results = pool.clone(), []
    for row in range(batch):
        if int(rows[row]) != causal_conv1d.PAD_SLOT_ID:
            window = [*pool[int(rows[row])].T.clone(), x[row]]
            results.append((row, *Convolution(weight, bias).token(window)))
            wanted_pool[int(rows[row])] = torch.stack(window[1:], 1)
    got = causal_conv1d.causal_conv1d_update(x, pool, weight, bias, "silu", conv_state_indices=rows)
    assert torch.equal(pool, wanted_pool)
    assert got.shape == x.shape
    for row, exact, terms in results:
        assert_within("convolution", got[row], exact, terms, GATE + width)


def test_convolution_of_a_tree_of_tokens(rng: torch.Generator) -> None:
    """What EAGLE drafts: tokens 1 and 2 follow 0, 3 follows 1, 4 follows 2; each sees its own ancestors and no sibling."""
    channels, width, count, parents = 5, 4, 5, [0, 0, 0, 1, 2]
    weight = randn(rng, channels, width)
    pool, x = randn(rng, 3, channels, width - 1), randn(rng, 1, channels, count)
    before = pool[2].clone()
    after = torch.zeros(4, count, channels, width - 1)
    found = torch.full((1, count), -5)
    got = causal_conv1d.causal_conv1d_update(
        x,
        pool,
        weight,
        None,
        True,
        conv_state_indices=torch.tensor([2]),
        intermediate_conv_window=after,
        intermediate_state_indices=torch.tensor([1]),
        retrieve_next_token=torch.tensor([[1, 3, 4, -1, -1]]),
        retrieve_next_sibling=torch.tensor([[-1, 2, -1, -1, -1]]),
        retrieve_parent_token=found,
    )
    assert found.tolist() == [parents]
    for token in range(count):
        ancestors = [token]
        while ancestors[0]:
            ancestors = [parents[ancestors[0]], *ancestors]
        window = [*before.T, *(x[0, :, ancestor] for ancestor in ancestors)][-width:]
        exact, terms = Convolution(weight, None).token(window)
        assert_within("convolution", got[0, :, token], exact, terms, GATE + width)
        assert torch.equal(after[1, token], torch.stack(window[1:], 1))
    assert torch.equal(pool[2], x[0, :, -(width - 1) :])
    assert not after[[0, 2, 3]].any()


def test_convolution_after_some_drafts_were_accepted(rng: torch.Generator) -> None:
    channels, width, count, accepted = 4, 4, 3, 2
    weight, pool, x = randn(rng, channels, width), randn(rng, 2, channels, width + count - 2), randn(rng, 1, channels, count)
    columns = [*pool[1].T.clone()][accepted - 1 :]
    got = causal_conv1d.causal_conv1d_update(
        x, pool, weight, None, "silu", conv_state_indices=torch.tensor([1]), num_accept_tokens=torch.tensor([accepted])
    )
    for token in range(count):
        window = [*columns[: width - 1], *(x[0, :, j] for j in range(token + 1))][-width:]
        exact, terms = Convolution(weight, None).token(window)
        assert_within("convolution", got[0, :, token], exact, terms, GATE + width)
    assert torch.equal(pool[1], torch.stack([*columns[1 : width - 1], *x[0].T], 1))


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 2), (2, 6), (1, 4)])
def test_projections_are_taken_apart(rng: torch.Generator, tokens: int, key_heads: int, value_heads: int) -> None:
    key_dim, value_dim, group = 3, 5, value_heads // key_heads
    sizes = (key_heads, value_heads, key_dim, value_dim)
    q, k = (randn(rng, tokens, key_heads, key_dim) for _ in range(2))
    v, z = (randn(rng, tokens, value_heads, value_dim) for _ in range(2))
    b, a = (randn(rng, tokens, value_heads) for _ in range(2))
    wanted = (torch.cat([x.flatten(1) for x in (q, k, v)], 1), z, b, a)
    side_by_side = torch.cat([x.flatten(1) for x in (q, k, v, z)], 1), torch.cat([b, a], 1)
    by_head, by_head_ba = [], []
    for head in range(key_heads):
        own = slice(head * group, (head + 1) * group)
        by_head += [q[:, head], k[:, head], *v[:, own].unbind(1), *z[:, own].unbind(1)]
        by_head_ba += [b[:, own], a[:, own]]
    found = {
        "contiguous": gated_delta_net.fused_qkvzba_split_reshape_cat_contiguous(*side_by_side, *sizes),
        "by head": gated_delta_net.fused_qkvzba_split_reshape_cat(torch.cat(by_head, 1), torch.cat(by_head_ba, 1), *sizes),
    }
    for way, parts in found.items():
        for part, right in zip(parts, wanted, strict=True):
            assert torch.equal(part, right), way
            assert part.is_contiguous(), way
    packed = side_by_side[0][:, : wanted[0].shape[1]]  # a view with gaps between its rows
    parts = gated_delta_net.fused_qkv_split_gdn_prefill(packed, key_heads, key_heads, value_heads, key_dim, key_dim, value_dim)
    for part, right in zip(parts, (q, k, v), strict=True):
        assert torch.equal(part, right.unsqueeze(0))
        assert part.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_gates(rng: torch.Generator, tokens: int, dtype: torch.dtype) -> None:
    heads = 3
    decay, bias = randn(rng, heads), randn(rng, heads)
    a, b = 9 * randn(rng, tokens, 2 * heads, dtype=dtype)[:, :heads], randn(rng, tokens, heads, dtype=dtype)
    g, beta = gated_delta_net.fused_gdn_gating(decay, a, b, bias)
    assert (g.shape, g.dtype, beta.shape, beta.dtype) == ((1, tokens, heads), torch.float32) * 2
    for token in range(tokens):
        for head in range(heads):
            x = float(a[token, head].float()) + float(bias[head])
            scale = math.exp(float(decay[head]))
            wanted = torch.tensor(-scale * math.log1p(math.exp(x)), dtype=torch.float64)
            assert_within("decay", g[0, token, head], wanted, torch.tensor(scale * (1 + abs(x)), dtype=torch.float64), GATE)
            rounded = torch.tensor(sigmoid(float(b[token, head])), dtype=torch.float64)
            assert_within("beta", beta[0, token, head].to(dtype), rounded, torch.ones((), dtype=torch.float64), GATE)
            assert float(beta[0, token, head]) == float(beta[0, token, head].to(dtype))


def normed(row: list[float], is_rms: bool = True) -> list[float]:
    mean = 0.0 if is_rms else math.fsum(row) / len(row)
    size = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row) + EPS)
    return [(x - mean) / size for x in row]


GATES = {"swish": silu, "silu": silu, "sigmoid": sigmoid}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize(("before_gate", "is_rms", "group"), [(True, True, None), (False, True, 4), (True, False, 8)])
def test_gated_norm(rng: torch.Generator, dtype: torch.dtype, activation: str, before_gate: bool, is_rms: bool, group: int | None) -> None:
    tokens, heads, size = 3, 2, 8
    x, weight = 3 * randn(rng, tokens * heads, size, dtype=dtype), randn(rng, size, dtype=dtype)
    z = randn(rng, tokens, heads, 2 * size, dtype=dtype)[..., :size]
    bias = None if is_rms else randn(rng, size, dtype=dtype)
    options = {"group_size": group, "norm_before_gate": before_gate, "is_rms_norm": is_rms, "activation": activation}
    got = gated_delta_net.rms_norm_gated(x=x, weight=weight, bias=bias, z=z, eps=EPS, **options)
    again = gated_delta_net.fla_rms_norm_gated(x, z.reshape(x.shape), weight, bias, activation, eps=EPS)
    for number, row in enumerate(x.tolist()):
        gates = [GATES[activation](value) for value in z[number // heads, number % heads].tolist()]
        groups = [row] if group is None else [row[at : at + group] for at in range(0, size, group)]
        if not before_gate:
            gated = [value * gate for value, gate in zip(row, gates, strict=True)]
            groups = [gated[at : at + (group or size)] for at in range(0, size, group or size)]
        hidden = [value for part in groups for value in normed(part, is_rms)]
        scaled = [h * w + (0.0 if bias is None else float(bias[j])) for j, (h, w) in enumerate(zip(hidden, weight.tolist(), strict=True))]
        wanted = [value * gate for value, gate in zip(scaled, gates, strict=True)] if before_gate else scaled
        terms = [6 * (1 + abs(value)) * (1 + abs(w)) for value, w in zip(wanted, weight.tolist(), strict=True)]
        exact = torch.tensor(wanted, dtype=torch.float64), torch.tensor(terms, dtype=torch.float64)
        assert_within("norm", got[number], *exact, 2 * GATE)
        if before_gate and is_rms:
            assert isinstance(again, torch.Tensor)
            assert_within("norm", again[number], *exact, 2 * GATE)
    assert got.dtype == dtype
    assert gated_delta_net.rms_norm_gated(x=x[:0], weight=weight, bias=bias, z=z[:0], eps=EPS, **options).shape == (0, size)


def test_gated_norm_hands_on_the_sum(rng: torch.Generator) -> None:
    x, residual, gate, weight = (randn(rng, *shape) for shape in ((4, 8), (4, 8), (4, 8), (8,)))
    found = gated_delta_net.fla_rms_norm_gated(x.bfloat16(), gate, weight, None, "silu", residual, prenorm=True, eps=EPS)
    assert isinstance(found, tuple)
    assert torch.equal(found[1], x.bfloat16().float() + residual)
    kept = gated_delta_net.fla_rms_norm_gated(x.bfloat16(), gate, weight, None, prenorm=True, residual_in_fp32=True)
    assert isinstance(kept, tuple)
    assert torch.equal(kept[1], x.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_norms_and_gates_of_heads(rng: torch.Generator, tokens: int, dtype: torch.dtype) -> None:
    heads, kv_heads, size = 4, 2, 6
    packed = randn(rng, tokens, 3 * heads * size + kv_heads * size, dtype=dtype)
    q_gate, k = packed[:, : 2 * heads * size], packed[:, -kv_heads * size :]  # views, as of a projection
    weights = [randn(rng, size, dtype=dtype) for _ in range(2)]
    q_out, k_out, gates = gated_delta_net.fused_qk_gemma_rmsnorm_with_gate(q_gate, k, *weights, EPS, size, heads)
    for out, count, weight, packed_size, source in ((q_out, heads, weights[0], 2 * size, q_gate), (k_out, kv_heads, weights[1], size, k)):
        assert out.shape == (tokens * count, size)
        for token in range(tokens):
            for head in range(count):
                row = source[token, head * packed_size : head * packed_size + size].tolist()
                wanted = [x * (1 + w) for x, w in zip(normed(row), weight.tolist(), strict=True)]
                terms = [3 * (1 + abs(w)) for w in weight.tolist()]
                exact = torch.tensor(wanted, dtype=torch.float64), torch.tensor(terms, dtype=torch.float64)
                assert_within("norm", out[token * count + head], *exact, 2 * GATE)
                if out is q_out:
                    behind = source[token, head * packed_size + size : (head + 1) * packed_size]
                    assert torch.equal(gates[token * heads + head], behind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gate_of_an_attention(rng: torch.Generator, inplace: bool, dtype: torch.dtype) -> None:
    tokens, heads, size = 3, 2, 5
    out = randn(rng, tokens, heads * size, dtype=dtype)
    gate = randn(rng, tokens, heads, 2 * size, dtype=dtype)[..., size:]
    before = out.clone()
    got = gates.fused_sigmoid_mul(out, gate, inplace=inplace)
    assert (got is out) == inplace
    assert inplace or torch.equal(out, before)
    for token in range(tokens):
        for place in range(heads * size):
            x = float(before[token, place])
            wanted = torch.tensor(x * sigmoid(float(gate[token, place // size, place % size])), dtype=torch.float64)
            assert_within("gate", got[token, place], wanted, torch.tensor(abs(x), dtype=torch.float64), GATE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_the_gate_of_a_shared_expert(rng: torch.Generator, tokens: int, dtype: torch.dtype) -> None:
    size = 6
    hidden, shared, rest = (randn(rng, tokens, size, dtype=dtype) for _ in range(3))
    weight, before = randn(rng, size, dtype=dtype), rest.clone()
    product = gates.fused_gate_sigmoid_mul(hidden, weight, shared)
    gates.fused_gate_sigmoid_mul_add(hidden, weight, shared, rest)
    assert (product.shape, product.dtype) == (shared.shape, dtype)
    for token in range(tokens):
        products = [h * w for h, w in zip(hidden[token].tolist(), weight.tolist(), strict=True)]
        gate = sigmoid(math.fsum(products))
        exact = gate * shared[token].double()
        terms = shared[token].double().abs() * (1 + sum(map(abs, products)))
        assert_within("product", product[token], exact, terms, GATE + size)
        assert_within("sum", rest[token], exact + before[token].double(), terms + before[token].double().abs(), GATE + size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(rng: torch.Generator, dtype: torch.dtype) -> None:
    x = 40 * randn(rng, 3, 9, dtype=dtype)
    before, given = x.clone(), x[:, :7]
    assert logits.softcap_inplace_logits(given, 30.0) is given
    wanted = torch.tensor([[30 * math.tanh(value / 30) for value in row] for row in before[:, :7].tolist()], dtype=torch.float64)
    assert_within("cap", given, wanted, 30 + before[:, :7].double().abs(), GATE)
    assert torch.equal(x[:, 7:], before[:, 7:])
