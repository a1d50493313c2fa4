# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: functions that fail in each way, in real captures; and the functions of FlagGems that are known for it, served."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.conftest import serving
from served_on_gpu import SHARE, check_the_recital

from sglang_fl.aten import AtenOperators
from sglang_fl.aten.agreement import agree
from sglang_fl.aten.capture import Capture
from sglang_fl.aten.trials import Trials
from sglang_fl.cli.demo_model import demo_model
from sglang_fl.config import Settings
from sglang_fl.dispatch.backends.flaggems import library
from sglang_fl.distributed.ranks import Ranks
from sglang_fl.fingerprint import read
from sglang_fl.startup.words import flaggems_functions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def synchronises(self: torch.Tensor) -> torch.Tensor:
    return self / (1 + torch.exp(-self)) if self.sum().item() < 1e30 else self


def allocates_on_the_host(self: torch.Tensor) -> torch.Tensor:
    torch.empty(1 << 20).to(self.device)
    return self / (1 + torch.exp(-self))


def raises(self: torch.Tensor) -> torch.Tensor:
    raise TypeError("CompilationError")


def another_dtype(self: torch.Tensor) -> torch.Tensor:
    return self.double()


@contextmanager
def planted(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[AtenOperators]:
    """FlagGems with another function for aten::silu, and its own div, exp and add."""
    function.__name__ = "silu"
    monkeypatch.setitem(library.load().FULL_CONFIG_BY_FUNC, "silu", [("silu", function)])
    found = AtenOperators(Settings(flagos_whitelist=("silu", "exp", "true_divide", "add")), Trials(captures_graphs=True))
    found.enable()
    found.disable()
    yield found


def graph_of(found: AtenOperators, x: torch.Tensor, breakable: bool = False) -> tuple[Any, torch.Tensor, int]:
    """As one of SGLang's backends captures it: two warm-ups, then the capture into a shared pool; with the number of attempts."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import BreakableCUDAGraph, BreakableCUDAGraphCapture

    state: dict[str, Any] = {"attempts": 0}
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture_one(forward: Callable[[], torch.Tensor]) -> None:
        for _ in range(2):
            torch.cuda.synchronize()
            forward()
        state["attempts"] += 1
        graph = BreakableCUDAGraph() if breakable else torch.cuda.CUDAGraph()
        capture = BreakableCUDAGraphCapture if breakable else torch.cuda.graph
        with capture(graph, pool=pool, stream=stream):
            state["out"] = forward()
        state["graph"] = graph

    Capture(found, Ranks(), "a test", lambda: torch.nn.functional.silu(x) + 1, capture_one, pool).run()
    return state["graph"], state["out"], state["attempts"]


def check(graph: Any, out: torch.Tensor, x: torch.Tensor) -> None:
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out.double(), torch.nn.functional.silu(x.double()) + 1, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("function", [synchronises, allocates_on_the_host, raises, another_dtype])
def test_what_fails_is_left_out_before_sglang_captures(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with planted(function, monkeypatch) as found:
        graph, out, attempts = graph_of(found, x)
    (reason,) = [why for key, _, why in found.report.left if key == "silu"]
    print(reason)
    assert reason.startswith("failed its trial on aten::silu") and attempts == 1
    assert {"exp", "add"} <= {function for _, function in found.report.replaced}, "a failed capture accuses nobody else"
    check(graph, out, x)


@pytest.mark.parametrize("breakable", [False, True])
def test_what_fails_in_a_capture_alone_costs_one_attempt(monkeypatch: pytest.MonkeyPatch, breakable: bool) -> None:
    """Its trial and its throw-away capture go well, and the memory of the abandoned graph comes back.

    The abandoned graph was the only one in the pool, and what it allocated is held.
    """
    calls: list[int] = []
    held_back: list[torch.Tensor] = []

    def later(self: torch.Tensor) -> torch.Tensor:
        calls.append(torch.cuda.is_current_stream_capturing())
        if calls[-1] and len(calls) > 3:
            held_back.append(torch.empty_like(self))
            self.sum().item()
        return self / (1 + torch.exp(-self))

    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with planted(later, monkeypatch) as found:
        graph, out, attempts = graph_of(found, x, breakable)
    assert attempts == 2 and next(why for key, _, why in found.report.left if key == "silu").startswith("could not be captured")
    check(graph, out, x)
    for _ in range(3):
        check(*graph_of(found, x, breakable)[:2], x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    graph_of(found, x, breakable)
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


#: Those that users report as ending captures, on calls like a model's.
OFFENDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "mm": lambda x: x @ x.T,
    "mul": lambda x: x * 2.0,
    "pad": lambda x: torch.nn.functional.pad(x, (1, 1)),
    "addmm": lambda x: torch.addmm(x[0, :64], x, x.T),
    "copy_": lambda x: x.clone().copy_(x),
    "to_copy": lambda x: x.float(),
    "index": lambda x: x[torch.arange(3, device=x.device)],
    "cumsum": lambda x: x.cumsum(0),
    "softmax": lambda x: x.softmax(-1),
    "sort": lambda x: x.sort(-1),
    "topk": lambda x: x.topk(4),
    "embedding": lambda x: torch.nn.functional.embedding(torch.arange(4, device=x.device), x),
}


def test_the_real_offenders_are_tried_and_the_rest_is_captured() -> None:
    """All of FlagGems, nothing left out by hand; prints what failed."""
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    expected = {name: call(x) for name, call in OFFENDERS.items()}
    found = AtenOperators(Settings(prefer="flagos"), Trials(captures_graphs=True))
    with found:
        for call in OFFENDERS.values():
            call(x)
        agree(found, Ranks())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = {name: call(x) for name, call in OFFENDERS.items()}
    graph.replay()
    torch.cuda.synchronize()
    assert found.trials is not None
    tried = {function for key, function in found.report.replaced if key in found.trials.passed}
    print("passed:", *sorted(tried))
    for function, why in found.excluded.items():
        print(f"failed: {function}: {why}")
    assert len(tried) > 5
    for name in OFFENDERS:
        if name not in ("sort", "topk"):  # whose ties may be in another order
            # bf16 has 8 bits: four units in the last place of the largest number, since sums are rounded in another order.
            torch.testing.assert_close(captured[name], expected[name], rtol=5e-2, atol=4 * 2**-8 * float(expected[name].abs().max()))


def everything() -> str:
    """All of FlagGems: what the profile leaves out too, but for mul, whose results may be wrong in a later call."""
    return ",".join(sorted((flaggems_functions() or frozenset()) - {"mul", "mul_"}))


@pytest.mark.parametrize(
    ("named", "environ"),
    [(set(), lambda: {"SGLANG_FL_PREFER": "flagos"}), (OFFENDERS.keys() - {"mul"}, lambda: {"SGLANG_FL_FLAGOS_WHITELIST": everything()})],
    ids=["what the profile knows as right", "everything"],
)
def test_a_server_with_all_of_flaggems_starts(named: set[str], environ: Callable[[], dict[str, str]], tmp_path: Path) -> None:
    """With SGLang's default flags. What fails is named in the log, and the answer is right."""
    record = {"SGLANG_FL_TRIAL_RECORD": str(tmp_path / "trials.json")}
    with serving(demo_model(), tmp_path, *SHARE, dtype="bfloat16", environ=environ() | record) as running:
        check_the_recital(running)
        log = running.server.log.read_text()
        (served,) = read(running.server.log)
    for line in re.findall(r".*(?:ATen operators:|the graph of|FlagGems replaces).*", log):
        print(line)
    assert "functions in graphs" in log and log.count("FlagGems's functions run in graphs of decode of up to") == 1
    assert named <= {*served["aten_functions"], *served["left_out"]}
