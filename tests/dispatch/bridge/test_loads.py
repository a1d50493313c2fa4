# SPDX-License-Identifier: Apache-2.0
"""Each load of a model is bound by its own settings and mode; what is recorded is what ran."""

import ast
import gc
import inspect
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import planted_gems
import pytest
import sglang_source as source
import torch
from implementations import manager_of, unchanged
from torch import nn

from sglang_fl import bind, startup
from sglang_fl.aten import restore_operators
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import BackendImplKind, OpImpl, PolicyManager, SelectionPolicy, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.recording import RecordingFunction
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.fingerprint.compare import MARK

from .sglang_layers import HIDDEN, Model, sglang_class

CPU = Device("cpu", "cpu", None, "a test")


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(startup, "_current", None)
    monkeypatch.setattr(bind, "_binder", None)
    monkeypatch.setattr(bind, "_told", {})
    monkeypatch.setattr(bind, "_announcements", {})
    # Hooks in SGLang's modules would outlive the test.
    monkeypatch.setattr(bind, "bind_kernels", lambda device, *, deterministic: {})
    monkeypatch.setattr("sglang_fl.aten.scope._hook", lambda target, function: None)
    monkeypatch.setattr(PolicyManager, "_instance", PolicyManager())
    yield


def binder() -> Binder:
    set_global_policy(SelectionPolicy())
    return Binder(
        manager_of(
            OpImpl("rms_norm", "reference.torch", BackendImplKind.REFERENCE, lambda layer, x, residual=None: (x, residual)),
            OpImpl("rms_norm", "vendor.exact", BackendImplKind.VENDOR, unchanged, vendor="x", writes_inputs=False, batch_invariant=True),
            OpImpl("rms_norm", "default.flagos", BackendImplKind.DEFAULT, unchanged, writes_inputs=False),
        )
    )


def norm() -> nn.Module:
    return sglang_class("RMSNorm")(HIDDEN)


def test_a_second_load_is_bound_by_its_own_settings_and_mode() -> None:
    process = binder()
    assert "flagos(default.flagos), 1 layer" in process.bind(Model(norm()), Load()).summary()
    assert "sglang(oot_blacklist), 1 layer" in process.bind(Model(norm()), Load(Settings(oot_blacklist=("RMSNorm",)))).summary()
    assert "vendor(vendor.exact), 1 layer" in process.bind(Model(norm()), Load(deterministic=True)).summary()
    assert "flagos(default.flagos), 1 layer" in process.bind(Model(norm()), Load()).summary()


def test_a_layer_keeps_the_mode_of_its_load_when_the_policy_changes() -> None:
    process = binder()
    exact, usual = norm(), norm()
    process.bind(Model(exact), Load(deterministic=True))
    process.bind(Model(usual), Load())
    set_global_policy(SelectionPolicy("vendor"))
    set_global_policy(SelectionPolicy("flagos"))
    x = torch.ones(2, HIDDEN)
    for layer, name in ((exact, "forward_vendor.exact"), (usual, "forward_default.flagos")):
        layer(x)
        assert layer._forward_method.__name__ == name


@pytest.mark.usefixtures("quick_collection")
def test_a_layer_that_is_dropped_while_the_policy_changes_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    process = binder()
    layers = [norm(), norm()]
    process.bind(Model(*layers), Load(Settings(prefer="vendor")))
    select = process._selector.select

    def drops_layers(*args: Any) -> Any:
        layers.clear()
        gc.collect()
        return select(*args)

    monkeypatch.setattr(process._selector, "select", drops_layers)
    set_global_policy(SelectionPolicy("flagos"))
    gc.collect()
    assert not process.sockets()


def test_the_same_model_bound_again_gives_back_what_is_now_excluded() -> None:
    process, layer = binder(), norm()
    process.bind(Model(layer), Load())
    process.bind(Model(layer), Load(Settings(oot_enabled=False)))
    assert layer._forward_method is None
    set_global_policy(SelectionPolicy("vendor"))
    assert layer._forward_method is None, "and follows no policy any more"


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang says of its server: no graphs."""
    mode = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        graph=SimpleNamespace(enable_torch_compile=False, cuda_graph_config=None),
        enable_pd_role_switch=False,
    )
    for name in ("get_exec", "get_disagg"):
        monkeypatch.setattr(f"sglang.srt.runtime_context.{name}", lambda: mode)
    return mode


@pytest.mark.parametrize("switches", [False, True])
def test_a_prefill_server_that_may_switch_its_role_captures_graphs_later(
    mode: SimpleNamespace, switches: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode.enable_pd_role_switch = switches
    startup.apply(Settings(prefer="flagos", flagos_scope="graphs"), CPU)
    monkeypatch.setattr("sglang_fl.aten.layer.why_not_here", lambda device: None)
    with caplog.at_level("INFO", "sglang_fl"), planted_gems.in_place_of_flaggems(planted_gems.gems()):
        bind.bind_model(Model(norm()), CPU)
        restore_operators()
    assert ("this server captures none" in caplog.text) is not switches


@pytest.mark.parametrize("debug", [False, True])
def test_what_holds_for_a_draft_too_is_told_once(
    mode: SimpleNamespace, debug: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --debug-cuda-graph SGLang's graphs are empty, and the model runs eagerly at each replay."""
    full = SimpleNamespace(backend="full")
    config = SimpleNamespace(decode=full, prefill=full)
    mode.graph = SimpleNamespace(enable_torch_compile=True, cuda_graph_config=config, debug_cuda_graph=debug)
    startup.apply(Settings(prefer="flagos", flagos_scope="graphs"), CPU)
    monkeypatch.setattr("sglang_fl.aten.layer.why_not_here", lambda device: None)
    with caplog.at_level("INFO", "sglang_fl"), planted_gems.in_place_of_flaggems(planted_gems.gems()):
        for _ in ("the model", "its draft"):
            bind.bind_model(Model(norm()), CPU)
        restore_operators()
    told = "sglang-fl: no ATen operator is replaced: flagos_scope is graphs" if debug else "sglang-fl: FlagGems replaces "
    assert len([message for message in caplog.messages if message.startswith(told)]) == 1
    assert ("and this server captures none" in caplog.text) is debug


def test_a_draft_of_its_targets_class_is_announced_beside_it(
    mode: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.runtime_context import get_flags

    startup.apply(Settings(prefer="flagos", flagos_scope="everywhere"), CPU)
    monkeypatch.setattr("sglang_fl.aten.layer.why_not_here", lambda device: None)
    with caplog.at_level("INFO", "sglang_fl"), planted_gems.in_place_of_flaggems(planted_gems.gems()):
        bind.bind_model(Model(norm()), CPU)
        with monkeypatch.context() as while_it_drafts:
            while_it_drafts.setattr(get_flags().moe, "in_speculative_scope", True)
            bind.bind_model(Model(norm()), CPU)
        bind._announce_again()  # as when a function is given back to PyTorch
        restore_operators()
    announced = [message.partition(": {")[0].partition(" of ")[2] for message in caplog.messages if message.startswith(MARK)]
    assert announced == ["Model", "Model (draft)"] * 2


def test_sglang_loads_each_draft_in_the_scope_that_tells_it_from_its_target() -> None:
    """And only drafts."""
    from sglang.srt.layers.moe.utils import draft_model_build_scope

    drafts, in_scope = [], []
    for module, tree in source.trees_below("speculative").items():
        scopes = [
            node for node in ast.walk(tree) if isinstance(node, ast.With) and "draft_model_build_scope()" in map(source.text, node.items)
        ]
        in_scope += [(module, source.text(call)) for scope in scopes for call in source.calls_with(scope, "is_draft_worker")]
        drafts += [(module, source.text(call)) for call in source.calls_with(tree, "is_draft_worker")]
    assert len(drafts) >= 5 and drafts == in_scope
    assert "moe.in_speculative_scope = True" in inspect.getsource(draft_model_build_scope)


@pytest.mark.parametrize(("decode", "prefill", "compiles"), [("full", "disabled", True), ("disabled", "breakable", False)])
def test_what_torch_compile_means_is_told_where_decode_is_captured(
    mode: SimpleNamespace, decode: str, prefill: str, compiles: bool, caplog: pytest.LogCaptureFixture
) -> None:
    phases = {phase: SimpleNamespace(backend=backend) for phase, backend in (("decode", decode), ("prefill", prefill))}
    mode.graph = SimpleNamespace(enable_torch_compile=True, cuda_graph_config=SimpleNamespace(**phases))
    startup.apply(Settings(prefer="reference"), CPU)
    with caplog.at_level("INFO", "sglang_fl"):
        bind.bind_model(Model(norm()), CPU)
    assert ("with --enable-torch-compile SGLang compiles its own" in caplog.text) is compiles


def test_bind_model_takes_the_settings_in_force(mode: SimpleNamespace) -> None:
    startup.apply(Settings(prefer="reference"), CPU)
    assert bind.bind_model(Model(norm()), CPU).bound == 1
    startup.apply(Settings(prefer="reference", oot_blacklist=("RMSNorm",)), CPU)
    assert bind.bind_model(Model(norm()), CPU).bound == 0
    startup.apply(Settings(prefer="reference"), CPU)
    mode.deterministic.enable_deterministic_inference = True
    assert "deterministic mode" in bind.bind_model(Model(norm()), CPU).summary()


def test_a_call_of_another_thread_is_not_taken_for_this_ones() -> None:
    """While this thread's call goes to SGLang, another thread's reaches the implementation."""
    function = RecordingFunction(lambda: None)

    def falls_back() -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    _, fell_back = function.record("RMSNorm", "flagos(default.flagos)", falls_back)
    assert fell_back
    _, fell_back = function.record("RMSNorm", "flagos(default.flagos)", function)
    assert not fell_back
