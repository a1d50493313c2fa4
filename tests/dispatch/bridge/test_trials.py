# SPDX-License-Identifier: Apache-2.0
"""What implementations are tried under, and what ranks tell each other of it."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_functions import reference
from implementations import manager_of, unchanged
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sglang_fl.check.cases import OPERATORS_CHECKED
from sglang_fl.dispatch import BackendImplKind, OpImpl, PolicyManager, SelectionPolicy, set_global_policy
from sglang_fl.dispatch.bridge import selector
from sglang_fl.dispatch.bridge.base import Bridge, ModelContext
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.bridges import FUNCTION_BRIDGES, LAYER_BRIDGES
from sglang_fl.dispatch.bridge.causal_conv1d import ConvolutionContext
from sglang_fl.dispatch.bridge.gated_delta_rule import GatedDeltaContext
from sglang_fl.dispatch.bridge.layer import LayerBridge
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.catalog import LAYERS
from sglang_fl.trial import Guard, TrialRecord

from .sglang_layers import ACTIVATION_LAYERS, HIDDEN, NORM_LAYERS, Model, experts, in_a_server, rotary, router, sglang_class

#: Whether a call of the implementation was made inside of the scope.
calls: list[bool] = []
inside = False


@contextlib.contextmanager
def in_graphs() -> Iterator[None]:
    global inside
    inside = True
    yield
    inside = False


def exact(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    calls.append(inside)
    return unchanged(layer, x, residual)


def fails_inside(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if inside:
        raise ArithmeticError("ATen operators are others here")
    return exact(layer, x, residual)


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicyManager, "_instance", PolicyManager())
    calls.clear()


def binder(fn: Any = exact) -> Binder:
    set_global_policy(SelectionPolicy())
    reference = OpImpl("rms_norm", "reference.torch", BackendImplKind.REFERENCE, exact)
    return Binder(manager_of(reference, OpImpl("rms_norm", "default.flagos", BackendImplKind.DEFAULT, fn)))


def model() -> Model:
    return Model(sglang_class("RMSNorm")(HIDDEN))


def test_a_trial_is_made_outside_and_inside_of_the_scope() -> None:
    process = binder()
    assert "flagos(default.flagos)" in process.bind(model(), Load()).summary()
    assert calls and not any(calls)
    calls.clear()
    assert "flagos(default.flagos)" in process.bind(model(), Load(in_graphs=in_graphs)).summary()
    assert calls == sorted(calls) and set(calls) == {False, True}, "a trial made under other conditions does not speak for these"


def test_what_fails_inside_of_the_scope_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    assert "flagos(default.flagos)" in binder(fails_inside).bind(model(), Load()).summary()
    report = binder(fails_inside).bind(model(), Load(in_graphs=in_graphs))
    assert "reference(reference.torch)" in report.summary()
    assert "default.flagos failed its trial on RMSNorm: ArithmeticError: ATen operators are others here" in caplog.text


def test_what_sglang_calls_between_the_segments_of_a_graph_is_tried_outside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a sequence's length on the host, as the references of prefill do, is right there."""
    monkeypatch.setattr(Bridge, "captured", False)
    assert "flagos(default.flagos)" in binder(fails_inside).bind(model(), Load(in_graphs=in_graphs)).summary()
    monkeypatch.undo()
    for bridge in (*LAYER_BRIDGES, *FUNCTION_BRIDGES):
        assert bridge.captured is OPERATORS_CHECKED[bridge.op].captured, bridge.op


def test_what_would_be_used_first_and_is_not_is_known_with_the_reason() -> None:
    process, layers = binder(fails_inside), model()
    process.bind(layers, Load())
    assert process.refused() == {}
    process.bind(layers, Load(in_graphs=in_graphs))
    assert process.refused() == {"RMSNorm → default.flagos": "failed its trial: ArithmeticError: ATen operators are others here"}
    process.bind(layers, Load(excluded={"rms_norm: default.flagos": "SIGSEGV"}))
    assert process.refused() == {"RMSNorm → default.flagos": "it crashed or hung in an earlier start: SIGSEGV"}


def test_what_failed_on_another_rank_is_passed_over_here(caplog: pytest.LogCaptureFixture) -> None:
    rounds: list[Any] = []

    def exchange(value: Any) -> list[Any]:
        rounds.append(value)
        return [value, {(0, "default.flagos"): "ArithmeticError: on that rank"}]

    assert "reference(reference.torch)" in binder().bind(model(), Load(), exchange).summary()
    assert len(rounds) == 2 and rounds[0] == {} and set(rounds[1]) == {(0, "default.flagos")}
    assert "default.flagos failed its trial on RMSNorm: RuntimeError: rank 1: ArithmeticError: on that rank" in caplog.text


def test_what_ended_an_earlier_start_is_passed_over() -> None:
    load = Load(excluded={"rms_norm: default.flagos": "its process ended with 'Aborted'"})
    assert "reference(reference.torch)" in binder().bind(model(), load).summary()
    assert not [name for name in calls if name]


@pytest.mark.parametrize("first", ["flagos", "reference"])
def test_a_strict_start_stops_if_it_would_use_it(first: str) -> None:
    load = Load(excluded={"rms_norm: default.flagos": "its process ended with 'Aborted'"})
    process = binder()
    set_global_policy(SelectionPolicy(strict=True, per_op_order={"rms_norm": f"{first}|sglang"}))
    if first == "reference":
        assert "reference(reference.torch)" in process.bind(model(), load).summary()
        return
    with pytest.raises(RuntimeError, match=r"rms_norm: default.flagos: it crashed .*strict is set.* 'sglang-fl doctor --forget'"):
        process.bind(model(), load)


def test_its_name_is_written_down_before_its_first_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "trials.json", "a chip")
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard(record))
    noted: list[str] = []

    def reads(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        noted.append(os.pread(record.file, 1000, 0).decode().splitlines()[-1])
        return exact(layer, x, residual)

    binder(reads).bind(model(), Load())
    assert set(noted) == {"rms_norm: default.flagos"}
    assert len(os.pread(record.file, 1000, 0).splitlines()) == 1, "and nothing stays"
    record.close()


class Allocated(TorchDispatchMode):
    """Counts the bytes of what is newly made, freed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._seen = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen |= {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._seen:
                self.bytes += leaf.untyped_storage().nbytes()
        return result


#: At least as wide as any model of check/cases/models.json.
WIDEST = ModelContext(torch.bfloat16, torch.device("cpu"), intermediate_size=65536, num_experts=512, heads=(128, 64))
GATED = GatedDeltaContext(torch.bfloat16, torch.float32, torch.device("cpu"), 16, 32, 128, 128)


CONVOLUTIONS = ConvolutionContext(torch.bfloat16, torch.bfloat16, torch.device("cpu"), 8192, 4, "silu")
#: A layer of each class that a bridge is made for, as wide as models have it.
WIDE_LAYERS: dict[str, Callable[[], Any]] = {
    **{name: partial(lambda name: sglang_class(name)(), name) for name in ACTIVATION_LAYERS},
    **{name: partial(lambda name: sglang_class(name)(18432), name) for name in NORM_LAYERS},
    "RotaryEmbedding": lambda: rotary("RotaryEmbedding", head=256, rotary_dim=256),
    "MRotaryEmbedding": lambda: rotary("MRotaryEmbedding", head=256, rotary_dim=256, mrope_section=[48, 40, 40]),
    "TopK": lambda: router(top_k=22),
    "UnquantizedFusedMoEMethod": lambda: experts(hidden_size=8192).quant_method,
}


@pytest.mark.parametrize("bridge", [*LAYER_BRIDGES, *FUNCTION_BRIDGES], ids=lambda bridge: type(bridge).__name__)
def test_a_trial_is_small(bridge: Any) -> None:
    """At most three calls, and 64 MiB beside what the implementation itself takes."""
    made = 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        with _disable_current_modes():
            return getattr(reference, bridge.op)(*args, **named)

    with in_a_server():
        is_layer = isinstance(bridge, LayerBridge)
        subject = WIDE_LAYERS[bridge.class_name or LAYERS[bridge.op][0][1]]() if is_layer else bridge
        context = WIDEST if is_layer else CONVOLUTIONS if "conv" in bridge.op else GATED
        with Allocated() as allocated:
            bridge.trial(subject, context, counted)
    assert 1 <= made <= 3
    assert 0 < allocated.bytes <= 64 << 20


def test_a_long_trial_is_logged_with_its_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(selector, "_LONG", 0.0)
    caplog.set_level("INFO")
    binder().bind(model(), Load())
    assert re.search(r"rms_norm: trial of default.flagos took \d+ s, compiling included", caplog.text)
