# SPDX-License-Identifier: Apache-2.0
"""A tiny hybrid of Qwen3.5's kind that recites, and how far two correct evaluations of it may differ.

Two layers of linear attention (a gated delta rule) and one of full attention. The model is written out here in float64,
as the transformers library casts to fp32 in its own; see ``forward_error.py`` for the analysis.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch.nn import functional

from sglang_fl.check.exact import gated_delta_rule as exact_rule
from sglang_fl.cli.demo_model import QUESTION, RECITAL, reciting_model

from .conftest import Prompt
from .forward_error import _ELEMENTWISE, CONFIDENCE, U32, _sum, _Tape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ROTARY = 128, 4, 2, 64, 16
KEY_HEADS, VALUE_HEADS, LINEAR_DIM, KERNEL, LAYERS = 2, 4, 32, 4, 3
EPS, BASE = 1e-6, 10000.0


def build(end: int) -> "PreTrainedModel":
    """The model with random weights; with all that it is made of in here, since the recipe's text names its directory."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        full_attention_interval=3,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    config.full_attention_interval = 3  # transformers turns it into layer types and drops it; SGLang reads it
    return Qwen3_5ForCausalLM(config)


def hybrid_model() -> Path:
    return reciting_model("demo-qwen3.5", build)


class _HybridTape(_Tape):
    """One that knows results which are not rounded to the activations' dtype: gates, which stay in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.exact_entries: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add_with_error(self, result: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """``error``: all that the result may be wrong by."""
        result.retain_grad()
        self.exact_entries.append((result, error))
        return result

    def bound(self) -> float:
        squares = (super().bound() / CONFIDENCE) ** 2
        for result, error in self.exact_entries:
            if result.grad is not None:
                squares += float((result.grad.abs() * error).sum(-1).square().sum())
                result.grad = None
        return CONFIDENCE * math.sqrt(squares)


class _Exact:
    """The model in float64, with each operator's result on a tape."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.weights = {name.removeprefix("model."): x.double() for name, x in load_file(path / "model.safetensors").items()}
        self.dtype, self.tape = dtype, _HybridTape(dtype)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return self.tape.add(x @ weight.T, x.abs() @ weight.abs().T, _sum(weight.shape[1]))

    def elementwise(self, x: torch.Tensor) -> torch.Tensor:
        return self.tape.add(x, x.abs(), _ELEMENTWISE)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
        return self.tape.add(y, y.abs(), _ELEMENTWISE + _sum(x.shape[-1]))

    def gemma_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, 1 + self.weights[f"{name}.weight"])

    def logits(self, tokens: list[int]) -> torch.Tensor:
        x = self.weights["embed_tokens.weight"][tokens].requires_grad_()
        for layer in range(LAYERS):
            at = f"layers.{layer}"
            mixer = self.attention if (layer + 1) % 3 == 0 else self.gated_delta_net
            x = self.elementwise(x + mixer(at, self.gemma_norm(f"{at}.input_layernorm", x)))
            h = self.gemma_norm(f"{at}.post_attention_layernorm", x)
            gate, up = self.linear(f"{at}.mlp.gate_proj", h), self.linear(f"{at}.mlp.up_proj", h)
            x = self.elementwise(x + self.linear(f"{at}.mlp.down_proj", self.elementwise(functional.silu(gate) * up)))
        return self.linear("lm_head", self.gemma_norm("norm", x))

    def attention(self, at: str, h: torch.Tensor) -> torch.Tensor:
        at = f"{at}.self_attn"
        count = len(h)
        query, gate = self.linear(f"{at}.q_proj", h).view(count, HEADS, 2 * HEAD_DIM).chunk(2, -1)
        key, value = (self.linear(f"{at}.{name}", h).view(count, KV_HEADS, HEAD_DIM) for name in ("k_proj", "v_proj"))
        q, k = (self.rotary(self.gemma_norm(f"{at}.{name}", x)) for name, x in (("q_norm", query), ("k_norm", key)))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        out, terms = (torch.einsum("hqk,khd->qhd", weights, x) for x in (v, v.abs()))
        size = float(q.detach().norm(dim=-1).max() * k.detach().norm(dim=-1).max()) / math.sqrt(HEAD_DIM)
        out = self.tape.add(out, terms, _sum(count) + _sum(HEAD_DIM) * max(1.0, size))
        return self.linear(f"{at}.o_proj", self.elementwise((out * gate.sigmoid()).flatten(1)))

    def rotary(self, x: torch.Tensor) -> torch.Tensor:
        frequencies = BASE ** -(torch.arange(0, ROTARY, 2, dtype=torch.float64) / ROTARY)
        angles = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies).unsqueeze(1)
        a, b = x[..., : ROTARY // 2], x[..., ROTARY // 2 : ROTARY]
        turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
        terms = [(a * angles.cos()).abs() + (b * angles.sin()).abs(), (b * angles.cos()).abs() + (a * angles.sin()).abs()]
        # An angle of one rounding more turns by that many numbers of its size.
        roundings = _ELEMENTWISE + float(angles.max())
        return self.tape.add(torch.cat((*turned, x[..., ROTARY:]), -1), torch.cat((*terms, x[..., ROTARY:].abs()), -1), roundings)

    def gated_delta_net(self, at: str, h: torch.Tensor) -> torch.Tensor:
        at = f"{at}.linear_attn"
        count = len(h)
        mixed = self.linear(f"{at}.in_proj_qkv", h)
        kernel = self.weights[f"{at}.conv1d.weight"].squeeze(1)
        window = functional.pad(mixed.T, (KERNEL - 1, 0)).unfold(-1, KERNEL, 1)
        mixed = (window * kernel.unsqueeze(1)).sum(-1).T
        terms = (window * kernel.unsqueeze(1)).abs().sum(-1).T
        mixed = self.tape.add(functional.silu(mixed), terms, _ELEMENTWISE)
        q, k, v = (x.unflatten(-1, (-1, LINEAR_DIM)) for x in mixed.split([KEY_HEADS * LINEAR_DIM] * 2 + [VALUE_HEADS * LINEAR_DIM], -1))
        decay = -self.weights[f"{at}.A_log"].exp()
        soft = functional.softplus(self.linear(f"{at}.in_proj_a", h) + self.weights[f"{at}.dt_bias"])
        # A gate near zero: exp is rounded at the size of 1 before its logarithm is taken.
        g = self.tape.add_with_error(decay * soft, _ELEMENTWISE * U32 * decay.abs() * (soft.detach() + 1))
        beta = self.elementwise(self.linear(f"{at}.in_proj_b", h).sigmoid())
        out = self.delta_rule(q, k, v, g, beta)
        z = self.linear(f"{at}.in_proj_z", h).view(count, VALUE_HEADS, LINEAR_DIM)
        out = self.elementwise(self.norm(out, self.weights[f"{at}.norm.weight"]) * functional.silu(z))
        return self.linear(f"{at}.out_proj", out.flatten(1))

    def delta_rule(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        inputs = [x.detach().unsqueeze(0) for x in (q, k, v, g, beta)]
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k = (x.repeat_interleave(VALUE_HEADS // KEY_HEADS, 1) for x in (q / math.sqrt(LINEAR_DIM), k))
        state = torch.zeros(VALUE_HEADS, LINEAR_DIM, LINEAR_DIM, dtype=torch.float64)
        rows = []
        for token in range(len(q)):
            state = state * g[token].exp()[:, None, None]
            wrong_by = v[token] - torch.einsum("hvk,hk->hv", state, k[token])
            state = state + torch.einsum("hv,hk->hvk", beta[token].unsqueeze(-1) * wrong_by, k[token])
            rows.append(torch.einsum("hvk,hk->hv", state, q[token]))
        # What an implementation's own roundings may cost is known from the checks, which are as confident already.
        rounded = [x.to(self.dtype) for x in inputs[:3]] + [x.float() for x in inputs[3:]]
        wanted = exact_rule.chunk_gated_delta_rule(*rounded, use_qk_l2norm_in_kernel=True)[0]
        assert isinstance(wanted.lost, torch.Tensor)
        return self.tape.add_with_error(
            torch.stack(rows), wanted.lost[0] / exact_rule.CONFIDENCE + torch.finfo(self.dtype).eps * wanted.terms[0]
        )


def logprobs_and_bounds(model_path: Path, tokens: list[int], dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The exact logprob of each token but the first, and how far one evaluation in ``dtype`` may be from it."""
    model = _Exact(model_path, dtype)
    logits = model.logits(tokens)
    wanted = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1)
    bounds = []
    for logprob in wanted:
        logprob.backward(retain_graph=True)
        bounds.append(model.tape.bound() + _sum(logits.shape[-1]) * U32 * max(1.0, abs(float(logprob.detach()))))
    return wanted.detach().tolist(), bounds


def make_prompts(model_path: Path, dtype: torch.dtype) -> list[Prompt]:
    """Some of the recited text, of which the model is sure, and tokens at random, of which it is not."""
    from transformers import AutoTokenizer

    recital = AutoTokenizer.from_pretrained(model_path)(
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{RECITAL}"
    ).input_ids
    random = torch.randint(3, 490, (24,), generator=torch.Generator().manual_seed(4)).tolist()
    return [Prompt(tokens, *logprobs_and_bounds(model_path, tokens, dtype)) for tokens in (recital[:72], random)]
