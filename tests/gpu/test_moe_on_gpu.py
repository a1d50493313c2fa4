# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: routing and experts against float64, in CUDA graphs, and a Qwen3-MoE that is served with them."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import DTYPES
from e2e.conftest import Running
from e2e.qwen3_moe_model import qwen3_moe_model
from moe_accuracy import check, refused
from served_on_gpu import FLAGOS, Way, check_the_recital, side_by_side

from sglang_fl.check.cases.call import Draw
from sglang_fl.check.cases.moe import ExpertsForm, RoutingForm
from sglang_fl.dispatch import OpManager, SelectionPolicy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

KINDS = {"topk": ("flagos", "vendor", "reference"), "fused_moe": ("flagos", "triton", "reference")}
BOTH = [(op, kind) for op, kinds in KINDS.items() for kind in kinds]
BY_BEST = {"experts=160 top_k=6 groups=8 topk_group=3 factor=16 as_they_are", "experts=160 top_k=6 groups=8 topk_group=3 scoring=sigmoid"}
NOT_GATED_BY_SILU = {
    *(f"activation={name}" for name in ("gelu", "gelu_tanh", "relu2")),
    *(f"activation={name} not_gated" for name in ("silu", "gelu", "gelu_tanh", "relu2")),
}
#: What an implementation does not take, and says so.
REFUSED = {
    ("topk", "flagos"): BY_BEST | {"scoring=sigmoid"},
    ("topk", "vendor"): BY_BEST | {"scoring=sigmoid"},
    ("topk", "reference"): set(),
    ("fused_moe", "flagos"): NOT_GATED_BY_SILU,
    ("fused_moe", "triton"): set(),
    ("fused_moe", "reference"): set(),
}
#: Qwen3-30B-A3B's and DeepSeek-V3's routing, and Qwen3-30B-A3B's experts.
LARGE = {
    "topk": (
        RoutingForm(tokens=8192, experts=128),
        RoutingForm(tokens=8192, experts=256, scoring="sigmoid", bias="float32", groups=8, topk_group=4, factor=2.5, on_output=True),
        RoutingForm(tokens=3, experts=512, top_k=8),
    ),
    "fused_moe": (
        ExpertsForm(tokens=2, hidden=2048, size=768, experts=128, top_k=8),
        ExpertsForm(tokens=64, hidden=2048, size=768, experts=128, top_k=8),
        ExpertsForm(tokens=512, hidden=2048, size=192, experts=64, top_k=8, elsewhere=0.5),
    ),
}


@pytest.fixture(scope="module")
def manager() -> OpManager:
    return OpManager()


def implementation(manager: OpManager, op: str, kind: str) -> Callable[..., Any]:
    plan = manager.plan(op, SelectionPolicy(per_op_order=((op, (kind,)),)))
    assert plan.candidates, plan.describe()
    return plan.candidates[0].function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "kind"), BOTH)
def test_every_case(manager: OpManager, op: str, kind: str, dtype: torch.dtype) -> None:
    if op == "fused_moe" and kind != "reference" and dtype is torch.float32:
        pytest.skip("Triton multiplies fp32 in TF32; these take none, and say so")
    assert refused(op, implementation(manager, op, kind), dtype, "cuda").keys() == REFUSED[op, kind]


@pytest.mark.parametrize(("op", "kind"), BOTH)
def test_large_models(manager: OpManager, op: str, kind: str) -> None:
    for form in LARGE[op]:
        check(op, implementation(manager, op, kind), form, torch.bfloat16, "cuda")


@pytest.mark.parametrize(("op", "kind"), BOTH)
def test_a_graph_replays_with_new_data(manager: OpManager, op: str, kind: str) -> None:
    """As decoding does it: padded, and with experts of another rank."""
    fn = implementation(manager, op, kind)
    form: Any = RoutingForm(tokens=16, experts=128, real=11) if op == "topk" else ExpertsForm(tokens=16, experts=16, top_k=4, elsewhere=0.3)
    device = torch.device("cuda")

    def drawn(seed: int) -> Any:
        return form(Draw(torch.Generator().manual_seed(seed), torch.bfloat16, device))

    call = drawn(0)
    arguments, named = call.arguments()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn(*arguments, **named)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fn(*arguments, **named)
    for seed in range(1, 4):
        fresh = drawn(seed)
        for name, x in call.tensors().items():
            x.copy_(fresh.tensors()[name])
        graph.replay()
        wanted_arguments, wanted_named = fresh.arguments()
        wanted = fn(*wanted_arguments, **wanted_named)
        if op == "topk":
            assert torch.equal(got[1], wanted[1])
            assert torch.equal(got[0][:11], wanted[0][:11])
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(("op", "kind"), BOTH)
def test_the_same_again_is_the_same(manager: OpManager, op: str, kind: str) -> None:
    fn = implementation(manager, op, kind)
    form: Any = (
        RoutingForm(tokens=8192, experts=128) if op == "topk" else ExpertsForm(tokens=4096, hidden=512, size=128, experts=32, top_k=4)
    )
    arguments, named = form(Draw(torch.Generator().manual_seed(5), torch.bfloat16, torch.device("cuda"))).arguments()
    first = fn(*arguments, **named)
    for _ in range(20):
        again = fn(*arguments, **named)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (again, first)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS["fused_moe"])
def test_more_tokens_than_flaggems_takes_at_once(manager: OpManager, kind: str) -> None:
    """It cuts them at 16384."""
    check("fused_moe", implementation(manager, "fused_moe", kind), ExpertsForm(tokens=20000, hidden=64, size=32), torch.bfloat16, "cuda")


WAYS = {
    "sglang": Way("sglang(policy)", {"SGLANG_FL_PER_OP": "topk=sglang;fused_moe=sglang", "USE_FLAGGEMS": "0"}),
    "flagos": Way("flagos(default.flagos)", FLAGOS),
    "vendor": Way("vendor(vendor.cuda)", {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_PER_OP": "fused_moe=flagos"}),
    "reference": Way("reference(reference.torch)", {"SGLANG_FL_PREFER": "reference"}),
}
#: Where experts run, if not where routing does: nvidia.yaml has this package's kernel before FlagGems's.
EXPERTS = {"flagos": "triton(triton.sglang_fl)", "vendor": "flagos(default.flagos)"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    with side_by_side(qwen3_moe_model(), WAYS, "bfloat16", tmp_path_factory) as found:
        yield found


@pytest.mark.parametrize("way", WAYS)
def test_a_served_qwen3_moe_recites(servers: dict[str, Future[Running]], way: str) -> None:
    """Its logprobs are compared on the CPU in fp32: in bf16 rounding alone gives some tokens other experts."""
    running = servers[way].result()
    check_the_recital(running)
    topk = WAYS[way].destination
    assert {f"TopK → {topk}", f"UnquantizedFusedMoEMethod → {EXPERTS.get(way, topk)}"} <= running.dispatched()


def test_sglangs_own_router_and_ours_choose_alike(manager: OpManager) -> None:
    """The kernel that SGLang runs on CUDA, called as SGLang calls it, and vendor.cuda."""
    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate

    call = RoutingForm(tokens=64, experts=128)(Draw(torch.Generator().manual_seed(1), torch.bfloat16, torch.device("cuda")))
    arguments, named = call.arguments()
    weights, ids = implementation(manager, "topk", "vendor")(*arguments, **named)
    own = SimpleNamespace(**dict(zip(("weights", "ids"), moe_fused_gate(arguments[2], None, 8, scoring_func="softmax"), strict=True)))
    assert torch.equal(weights, own.weights) and torch.equal(ids, own.ids)
