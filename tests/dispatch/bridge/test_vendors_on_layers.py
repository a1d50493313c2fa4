# SPDX-License-Identifier: Apache-2.0
"""The backends of vendors, on stand-ins of their kernels, bound to SGLang's real layers and called as models call those.

What the kernels compute is held against float64 elsewhere (tests/dispatch/backends); here it is what lies between: views of
packed projections, one token, none, and results that were written in place.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dispatch.backends.test_ascend import backend as ascend
from dispatch.backends.test_cuda import backend as cuda
from sglang.kernels.fused_op import BaseFusedOp
from torch import nn

from sglang_fl.dispatch.catalog import CUSTOM_FORWARD, STANDALONE_CLASSES

from .sglang_layers import ACTIVATION_LAYERS, HEAD, HIDDEN, MAX_POSITION, NORM_LAYERS, OP_OF, ROTARY_LAYERS, sglang_class
from .test_bridges import CALLS, bind

__all__ = ["ascend", "cuda"]
pytestmark = pytest.mark.usefixtures("reference_policy")
BF16 = torch.bfloat16
TOKENS = (0, 1, 2, 17)
#: What a vendor has no kernel for.
LACKING = {"cuda": {"new_gelu", "quick_gelu"}, "ascend": {"relu2"}}
KINDS = ("cuda", "ascend")


#: Imported before stand-ins take the places of SGLang's modules.
CLASSES = [sglang_class(name) for names in (ROTARY_LAYERS, NORM_LAYERS, ACTIVATION_LAYERS) for name in names]


def pair(make: Callable[[], nn.Module], op: str, backend: Any) -> tuple[Any, Any]:
    """The same layer bound to the reference and to the backend."""
    torch.manual_seed(0)
    one = make()
    two = make()
    two.load_state_dict(one.state_dict())
    assert bind(one, dtype=BF16).bound == 1
    report = bind(two, dtype=BF16, **{op: getattr(backend, op)})
    assert report.bound == 1, report.summary()
    return one, two


def agree(got: Any, wanted: Any) -> None:
    """Both round once, from arithmetic in fp32: a few numbers fall on the other side."""
    for one, other in zip(got if isinstance(got, tuple) else (got,), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(other.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", sorted(set(ROTARY_LAYERS) - CUSTOM_FORWARD))
def test_rotary(
    name: str,
    tokens: int,
    in_place: bool,
    kind: str,
    request: pytest.FixtureRequest,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, op = request.getfixturevalue(kind), OP_OF[name]
    if in_place:  # as on CUDA: the model keeps the tensors that it gave
        monkeypatch.setattr(BaseFusedOp, "_resolve_forward_method", lambda self: self.forward_cuda)
    # On CUDA cos and sin are in fp32.
    one, two = pair(lambda: ROTARY_LAYERS[name](dtype=torch.float32), op, backend)
    rows = [torch.randint(0, MAX_POSITION, (tokens,), generator=rng)]
    if op == "mrotary_embedding":
        rows.append(torch.randint(0, MAX_POSITION, (3, tokens), generator=rng))
    for positions in rows:
        packed = torch.randn(tokens, 8 * HEAD, generator=rng).to(BF16)
        query, key, value = packed.split([4 * HEAD, 2 * HEAD, 2 * HEAD], -1)
        untouched = value.clone()
        wanted = one(positions, query.clone(), key.clone())
        got = two(positions, query, key)
        agree(got, wanted)
        assert torch.equal(value, untouched)
        if in_place and (op == "rotary_embedding" or positions.dim() == 2):
            assert got[0] is query and got[1] is key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", sorted(set(NORM_LAYERS) - CUSTOM_FORWARD))
def test_norm(name: str, tokens: int, kind: str, request: pytest.FixtureRequest, rng: torch.Generator) -> None:
    backend, op = request.getfixturevalue(kind), OP_OF[name]

    def make() -> nn.Module:
        layer = NORM_LAYERS[name]()
        for parameter in layer.parameters():
            parameter.data.copy_(torch.rand(HIDDEN) + 0.5)
        return layer if op == "layer_norm" else layer.to(BF16)

    one, two = pair(make, op, backend)
    wide = torch.randn(tokens, 3 * HIDDEN, generator=rng).to(BF16)
    x = wide[:, HIDDEN : 2 * HIDDEN]
    agree(two(x), one(x.clone()))
    if op != "layer_norm" and name not in STANDALONE_CLASSES:
        x, residual = torch.randn(2, tokens, HIDDEN, generator=rng).to(BF16)
        agree(two(x.clone(), residual.clone()), one(x.clone(), residual.clone()))
    assert op in CALLS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", sorted(set(ACTIVATION_LAYERS) - CUSTOM_FORWARD))
def test_activation(name: str, tokens: int, kind: str, request: pytest.FixtureRequest, rng: torch.Generator) -> None:
    op = OP_OF[name]
    if op in LACKING[kind]:
        pytest.skip(f"{kind} has no {op}")
    one, two = pair(ACTIVATION_LAYERS[name], op, request.getfixturevalue(kind))
    wide = torch.randn(tokens, 6 * HIDDEN, generator=rng).to(BF16)
    for x in (wide, wide[:, 2 * HIDDEN : 4 * HIDDEN]):
        before = x.clone()
        agree(two(x), one(x.clone()))
        assert torch.equal(x, before)
