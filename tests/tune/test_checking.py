# SPDX-License-Identifier: Apache-2.0
"""Candidates on recorded calls, in the process that may die."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted_choices
import pytest
import torch
from backend_functions import reference

from sglang_fl.check.cases import Case
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import FAILED, OK, REPEATS, UNUSUAL
from sglang_fl.check.implementation import Implementation
from sglang_fl.tune import checking, recorded, worker
from sglang_fl.tune.checking import Checker, is_crash
from sglang_fl.tune.layer_calls import RecordedCall, TensorSpec

CPU = torch.device("cpu")
#: As after an illegal access: nothing in this process works on the device any more.
LOSES_THE_DEVICE = """
import torch
from sglang_fl.dispatch import BackendImplKind, OpImpl

def silu_and_mul(obj, x):
    torch.ones = silu_and_mul
    raise RuntimeError("illegal memory access")

def register_builtins(registry):
    registry.register_impl(OpImpl("silu_and_mul", "vendor.loses_the_device", BackendImplKind.VENDOR, silu_and_mul, vendor="planted"))
"""


class Activation(torch.nn.Module):
    """As SGLang's: without weights, with more about it than can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.approximate, self.unpicklable = "none", lambda: None


def recorded_call(op: str, obj: Any, *arguments: torch.Tensor) -> bytes:
    specs = tuple(TensorSpec.of(x) for x in arguments)
    socket: Any = SimpleNamespace(op=op, dtype=torch.float32)
    return RecordedCall(socket, obj, obj, specs, {}, specs).pickled()


def cases(data: bytes) -> list[Case]:
    return list(recorded.cases_of_recorded(data, "x", CPU))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What the process says of each planted candidate, in this order."""
    directory = tmp_path_factory.mktemp("checking")
    file = directory / "silu.call"
    file.write_bytes(recorded_call("silu_and_mul", Activation(), torch.randn(6, 128)[::2]))
    layer = {"kind": "layer", "op": "silu_and_mul", "name": "3x128", "file": str(file), "dtype": "float32"}
    (directory / "loses_the_device.py").write_text(LOSES_THE_DEVICE)
    rows = [layer | {"impl": f"vendor.{name}"} for name in ("loses_the_device", *planted_choices.KINDS)]
    x = {"shape": [4, 8], "stride": [8, 1], "dtype": "float32", "device": "cpu"}
    rows += [{"kind": "function", "function": "silu", "key": "silu", "args": [x], "kwargs": {}}]
    rows += [{"kind": "function", "function": "mul", "key": "mul.Tensor", "args": [x, x], "kwargs": {}}]
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(planted_choices.__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (tests, str(directory), os.environ.get("PYTHONPATH")))))
        patch.setenv("SGLANG_FL_PLUGIN_MODULES", "planted_choices,loses_the_device")
        with Checker(rows, directory / "cases.json") as checker:
            yield {row.get("impl", row.get("function")): checker.run(number) for number, row in enumerate(rows)}


@pytest.mark.parametrize("kind", ["right_and_faster", "right_and_slower", "a_tie", "slower_served"])
def test_what_is_right_passes_however_fast_it_is(found: dict[str, dict[str, Any]], kind: str) -> None:
    assert found[f"vendor.{kind}"] == {"status": OK, "message": ""}


def test_what_is_wrong_fails_and_says_by_how_much(found: dict[str, dict[str, Any]]) -> None:
    wrong, unsteady = found["vendor.faster_and_wrong"], found["vendor.not_deterministic"]
    assert wrong["status"] == FAILED and "out of bounds" in wrong["message"]
    assert unsteady["status"] == FAILED and "not deterministic" in unsteady["message"]


def test_what_ends_the_process_is_named_and_the_others_are_checked(found: dict[str, dict[str, Any]]) -> None:
    lost = found["vendor.loses_the_device"]
    assert lost["status"] == FAILED and "illegal memory access" in lost["message"]
    assert is_crash(found["vendor.crashing"]["status"]) and "SIGSEGV" in found["vendor.crashing"]["message"]
    assert found["silu"]["status"] == FAILED and "is off by" in found["silu"]["message"]
    assert found["mul"] == {"status": OK, "message": ""}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"right": True, "graph_why": "PyTorch's own cannot be captured either", "lost": True}, OK),
        ({"right": True, "graph_safe": False, "graph_why": "no", "lost": True}, FAILED),
    ],
)
def test_after_a_capture_that_cannot_be_undone_the_next_case_has_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], status: str
) -> None:
    x = {"shape": [4], "stride": [1], "dtype": "float32", "device": "cpu"}
    row = {"kind": "function", "function": "neg", "key": "neg", "args": [x], "kwargs": {}}
    (tmp_path / "cases.json").write_text("[]")
    monkeypatch.setattr(worker, "check_function", lambda case, device: found)
    one = worker.Worker(str(tmp_path / "cases.json"), lambda sent: None)
    one._cases, one._functions, one._dispatch_key = [row], {"neg": [("neg", torch.neg)]}, "CPU"
    processes: list[Any] = []

    class InThisProcess:
        def __init__(self, *_: Any):
            processes.append(self)
            self.answers: list[dict[str, Any]] = [{}]

        def ask(self, number: int) -> None:
            self.answers.append(one.run(number))

        def answer(self, seconds: float) -> dict[str, Any]:
            return self.answers.pop()

        def kill(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(checking, "Process", InThisProcess)
    with Checker([row], tmp_path / "cases.json") as checker:
        answers = [checker.run(0), checker.run(0)]
    assert [answer["status"] for answer in answers] == [status, status] and "lost" not in answers[0] and len(processes) == 2


def test_a_norms_weights_and_constants_are_those_of_the_model() -> None:
    layer = torch.nn.Module()
    layer.weight, layer.variance_epsilon = torch.nn.Parameter(torch.linspace(1, 2, 8)), 1e-3
    (first, *_) = cases(recorded_call("rms_norm", layer, torch.randn(4, 8), torch.randn(4, 8)))
    call = first.draw(1, CPU)
    assert call.layer.variance_epsilon == 1e-3 and call.may_write == {"x", "residual"}
    assert sorted(call.layer.weight.tolist()) == layer.weight.tolist() and call.inputs["residual"].shape == (4, 8)


def test_routing_is_checked_on_calls_whose_meaning_is_known() -> None:
    """What a layer's configuration means is not recorded."""
    recorded_cases = cases(recorded_call("topk", Activation(), torch.randn(4, 32), torch.randn(4, 64)))
    assert recorded_cases == list(recorded.cases_of_check("topk", torch.float32, CPU)) != []
    assert check_case(Implementation("topk", reference.topk, None, CPU), recorded_cases[0], 0).status == OK


def test_what_cannot_be_captured_fails_where_there_are_graphs(found: dict[str, dict[str, Any]]) -> None:
    unsafe = found["vendor.capture_unsafe"]
    assert unsafe["status"] == FAILED and "cannot be captured: StreamCaptureUnsupported: operation not permitted" in unsafe["message"]


def test_a_large_call_is_held_against_float64_once() -> None:
    layer = torch.nn.Module()
    layer.weight, layer.variance_epsilon = torch.nn.Parameter(torch.linspace(1, 2, 1024)), 1e-3
    found = cases(recorded_call("rms_norm", layer, torch.randn(4096, 1024)))
    assert [case.check for case in found] == [UNUSUAL, REPEATS]
    for fn, status in ((_norm, OK), (lambda *args: _norm(*args)[1].expand(4096, 1024), FAILED)):
        implementation = Implementation("rms_norm", fn, None, CPU)
        assert check_case(implementation, found[0], 0).status == status


def _norm(layer: torch.nn.Module, x: torch.Tensor, residual: None = None) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], layer.weight, layer.variance_epsilon)
