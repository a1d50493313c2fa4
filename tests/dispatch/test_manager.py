# SPDX-License-Identifier: Apache-2.0
import importlib
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from implementations import manager_of
from installed_packages import Packages

from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import (
    OPERATORS,
    BackendImplKind,
    OpImpl,
    OpManager,
    Refusal,
    SelectionPolicy,
    call_op,
    get_default_manager,
    policy_context,
    reset_default_manager,
    reset_global_policy,
    resolve_op,
    set_global_policy,
    with_strict_mode,
)
from sglang_fl.dispatch.backends.reference.reference import BACKEND
from sglang_fl.dispatch.builtin_ops import ENTRY_POINT_GROUP
from sglang_fl.dispatch.policy import PolicyManager

D, R, V = BackendImplKind.DEFAULT, BackendImplKind.REFERENCE, BackendImplKind.VENDOR


@pytest.fixture(autouse=True)
def known_policy() -> Iterator[None]:
    set_global_policy(SelectionPolicy())
    yield
    reset_global_policy()
    reset_default_manager()


def say(word: str, fails: bool = False) -> Callable[[], str]:
    def fn() -> str:
        if fails:
            raise ArithmeticError(f"{word} is broken")
        return word

    return fn


def standard(fails: tuple[str, ...] = (), **more: Any) -> OpManager:
    return manager_of(
        OpImpl("op", "reference.torch", R, say("reference", "reference" in fails), priority=50, **more),
        OpImpl("op", "default.flagos", D, say("flagos", "flagos" in fails), priority=150, **more),
        OpImpl("op", "vendor.a", V, say("a", "a" in fails), vendor="a", priority=100, **more),
        OpImpl("op", "vendor.b", V, say("b", "b" in fails), vendor="b", priority=101, **more),
    )


def order(*tokens: str, **more: Any) -> SelectionPolicy:
    return SelectionPolicy(per_op_order=(("op", tokens),), **more)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SelectionPolicy(), ["default.flagos", "vendor.b", "vendor.a", "reference.torch"]),
        (SelectionPolicy("vendor"), ["vendor.b", "vendor.a", "default.flagos", "reference.torch"]),
        (SelectionPolicy("reference"), ["reference.torch", "default.flagos", "vendor.b", "vendor.a"]),
        (order("vendor:a", "flagos"), ["vendor.a", "default.flagos"]),
        (order("impl:reference.torch"), ["reference.torch"]),
        (order("vendor:a", "vendor"), ["vendor.a", "vendor.b"]),
        (order("vendor", "sglang"), ["vendor.b", "vendor.a"]),
        (SelectionPolicy("vendor", deny_vendors=frozenset("b")), ["vendor.a", "default.flagos", "reference.torch"]),
        (SelectionPolicy("vendor", allow_vendors=frozenset("b")), ["vendor.b", "default.flagos", "reference.torch"]),
    ],
)
def test_candidates(policy: SelectionPolicy, expected: list[str]) -> None:
    manager = standard()
    with policy_context(policy):
        assert [impl.impl_id for impl in manager.resolve_candidates("op")] == expected
        assert manager.resolve("op") is manager.registry.get_implementation("op", expected[0]).fn  # type: ignore[union-attr]


def test_what_cannot_run_is_passed_over_with_its_reason() -> None:
    def fn() -> str:
        return "never"

    fn._is_available = lambda: 1 / 0  # type: ignore[attr-defined]
    manager = manager_of(OpImpl("op", "default.flagos", D, fn), OpImpl("op", "reference.torch", R, say("reference")))
    assert manager.call("op") == "reference"
    assert dict(manager.plan("op").passed_over)["default.flagos"] == "its availability check raised ZeroDivisionError: division by zero"


def test_availability_is_asked_once_whatever_the_policy() -> None:
    asked = []

    def fn() -> str:
        return "word"

    fn._is_available = lambda: asked.append(1) is None  # type: ignore[attr-defined]
    manager = manager_of(OpImpl("op", "default.flagos", D, fn))
    for _ in range(10):
        manager.call("op")
    with policy_context(SelectionPolicy("vendor")):
        manager.call("op")
    assert len(asked) == 1


def test_availability_follows_the_settings_and_the_device_that_were_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the environment, which may say otherwise by then."""
    monkeypatch.setattr("sglang_fl.dispatch.backends.flaggems.library.importlib.util.find_spec", lambda name: object())
    manager, nvidia = OpManager(), Device("nvidia", "cuda", "cuda", "a test")
    manager.ensure_initialized(())

    def flagos() -> str | None:
        return dict(manager.plan("rms_norm").passed_over).get("default.flagos")

    manager.use(Settings(use_flaggems=False), nvidia)
    assert flagos() is None, "it switches Layer 1 off, and nothing else"
    manager.use(Settings(), Device("thead", "cuda", "sail", "a test"))
    assert flagos() == "FlagGems does not support thead"


def test_settings_that_a_listener_refuses_are_not_used() -> None:
    class Listener:
        def look(self) -> None:
            assert manager.plan("rms_norm").candidates, "nothing can run"

    manager, cpu = OpManager(), Device("cpu", "cpu", None, "a test")
    manager.ensure_initialized(())
    with policy_context(SelectionPolicy(per_op_order={"rms_norm": "flagos"})), pytest.MonkeyPatch.context() as patch:  # type: ignore[arg-type]
        patch.setattr("sglang_fl.dispatch.backends.flaggems.flaggems.why_not_here", lambda device: None if device == cpu else "not there")
        manager.use(Settings(), cpu)
        manager.plan("rms_norm")
        listener = Listener()
        PolicyManager.get_instance().subscribe(listener.look)
        with pytest.raises(AssertionError, match="nothing can run"):
            manager.use(Settings(), Device("nvidia", "cuda", "cuda", "a test"))
        assert manager.plan("rms_norm").candidates


def test_a_manager_used_alone_reads_the_settings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    for name, answer in (("settings_in_force", Settings()), ("device_here", Device("cpu", "cpu", None, "a test"))):
        monkeypatch.setattr(f"sglang_fl.dispatch.manager.{name}", lambda name=name, answer=answer: read.append(name) or answer)
    manager = OpManager()
    manager.ensure_initialized(())
    for op in OPERATORS:
        manager.plan(op)
    assert read == ["settings_in_force", "device_here"]


def test_a_lazy_function_is_loaded_once_and_then_an_attribute_like_others() -> None:
    (impl,) = (one for one in BACKEND.implementations() if one.op_name == "silu_and_mul")
    assert impl.is_available() and "reference.torch" in repr(impl) and "function" not in vars(impl)
    before = hash(impl)
    from sglang_fl.dispatch.backends.reference.impl.activation import silu_and_mul

    assert impl.function is silu_and_mul and vars(impl)["function"] is silu_and_mul
    assert hash(impl) == before and impl == BACKEND.implementations()[0]
    assert pickle.loads(pickle.dumps(impl)) == impl


def test_an_interrupted_discovery_registers_nothing(packages: Packages) -> None:
    module = packages.install("raise KeyboardInterrupt", {ENTRY_POINT_GROUP: "{module}:register"})
    manager = OpManager()
    with pytest.raises(KeyboardInterrupt):
        manager.ensure_initialized(())
    assert manager.registry.list_operators() == []
    (packages.directory / f"{module}.py").write_text("def register(registry): pass")
    importlib.invalidate_caches()
    manager.ensure_initialized(())
    assert manager.registry.get_implementation("rms_norm", "reference.torch") is not None


def test_names_that_nobody_has_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """A ban of "nvdia" bans nobody."""
    manager = OpManager()
    policy = SelectionPolicy(deny_vendors=frozenset({"nvdia"}), per_op_order=(("rms_nrom", ("vendor:metaxx",)),))
    for op in ("rms_norm", "topk"):
        manager.plan(op, policy)
    for word, meant in (("nvdia", "nvidia"), ("rms_nrom", "rms_norm"), ("metaxx", "metax")):
        assert len([r for r in caplog.records if f"{word!r}; did you mean {meant!r}" in r.message]) == 1
    caplog.clear()
    manager.plan("topk", SelectionPolicy(deny_vendors=frozenset({"cuda", "metax"}), per_op_order=(("topk", ("impl:default.flagos",)),)))
    assert not caplog.records


def test_unknown_operator_names_the_nearest() -> None:
    with pytest.raises(RuntimeError, match=r"No available implementation for op='ops'.*did you mean 'op'"):
        standard().call("ops")


def test_nothing_available_says_why() -> None:
    with policy_context(order("vendor:c", "vendor:a", deny_vendors=frozenset("a"))), pytest.raises(RuntimeError) as caught:
        standard().call("op")
    assert str(caught.value).startswith("No available implementation for op=")
    assert "vendor:c: no backend implements it" in str(caught.value)
    assert "vendor.a: vendor a is not allowed" in str(caught.value)


def test_a_call_that_comes_to_sglang_raises() -> None:
    with policy_context(order("sglang")), pytest.raises(RuntimeError, match="leaves it to SGLang"):
        standard().call("op")


def test_registering_later_takes_effect() -> None:
    manager = standard()
    assert manager.call("op") == "flagos"
    manager.registry.register_impl(OpImpl("op", "default.better", D, say("better"), priority=200))
    assert manager.call("op") == "better"


def test_bump_policy_epoch_asks_again() -> None:
    state = {"there": False}

    def fn() -> str:
        return "flagos"

    fn._is_available = lambda: state["there"]  # type: ignore[attr-defined]
    manager = manager_of(OpImpl("op", "default.flagos", D, fn), OpImpl("op", "reference.torch", R, say("reference")))
    assert manager.call("op") == "reference"
    state["there"] = True
    assert manager.call("op") == "reference"
    manager.bump_policy_epoch()
    assert manager.call("op") == "flagos"


def test_failure_goes_up_when_inputs_may_have_been_written(caplog: pytest.LogCaptureFixture) -> None:
    manager = standard(fails=("flagos",))
    with caplog.at_level(logging.ERROR), pytest.raises(ArithmeticError, match="flagos is broken"):
        manager.call("op")
    assert "op: default.flagos raised ArithmeticError: flagos is broken" in caplog.text


def test_failure_is_retried_when_inputs_are_not_written(caplog: pytest.LogCaptureFixture) -> None:
    manager = standard(fails=("flagos", "b"), writes_inputs=False)
    with caplog.at_level(logging.ERROR):
        assert manager.call("op") == "a"
        assert manager.call("op") == "a"
    assert caplog.text.count("default.flagos raised") == 1


def test_failure_is_not_retried_when_strict() -> None:
    with with_strict_mode(), pytest.raises(ArithmeticError, match="flagos is broken"):
        standard(fails=("flagos",), writes_inputs=False).call("op")


def raises(error: Exception) -> Callable[[], str]:
    def fn() -> str:
        raise error

    return fn


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize(
    ("error", "writes_inputs", "retried"),
    [
        (Refusal("not these"), True, (True, True)),
        (Refusal("not these"), False, (True, True)),
        (ValueError("not these"), True, (False, False)),
        (ValueError("not these"), False, (True, True)),
        (NotImplementedError("not these"), False, (True, True)),
        (RuntimeError("CUDA error"), True, (False, False)),
        (RuntimeError("CUDA error"), False, (True, False)),
    ],
)
def test_who_may_take_the_call_after_which_error(
    error: Exception, writes_inputs: bool, retried: tuple[bool, bool], capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is being captured lives on after what an implementation raises of its own accord."""
    monkeypatch.setattr("sglang_fl.dispatch.manager.is_capturing", lambda: capturing)
    manager = manager_of(
        OpImpl("op", "default.flagos", D, raises(error), writes_inputs=writes_inputs), OpImpl("op", "reference.torch", R, say("reference"))
    )
    if retried[capturing]:
        assert manager.call("op") == "reference"
    else:
        with pytest.raises(type(error), match=str(error)):
            manager.call("op")
    with with_strict_mode(), pytest.raises(type(error), match=str(error)):
        manager.call("op")


def test_failure_is_not_retried_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.dispatch.manager.is_capturing", lambda: True)
    with pytest.raises(ArithmeticError, match="flagos is broken"):
        standard(fails=("flagos",), writes_inputs=False).call("op")


def test_all_failed() -> None:
    manager = standard(fails=("flagos", "a", "b", "reference"), writes_inputs=False)
    with pytest.raises(RuntimeError, match=r"All implementations failed for op='op'.*default.flagos: ArithmeticError") as caught:
        manager.call("op")
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_keyboard_interrupt_is_nobodys_failure() -> None:
    def fn() -> None:
        raise KeyboardInterrupt

    manager = manager_of(OpImpl("op", "default.flagos", D, fn, writes_inputs=False), OpImpl("op", "reference.torch", R, say("reference")))
    with pytest.raises(KeyboardInterrupt):
        manager.call("op")


def test_default_manager_finds_the_reference() -> None:
    manager = get_default_manager()
    assert manager is get_default_manager()
    manager.ensure_initialized()
    assert {"silu_and_mul", "rms_norm", "rotary_embedding"} <= set(manager.registry.list_operators())
    with policy_context(SelectionPolicy("reference")):
        assert resolve_op("rms_norm").__name__ == "rms_norm"
    reset_default_manager()
    assert manager is not get_default_manager()


def test_one_registration_however_many_threads() -> None:
    reset_default_manager()
    start, seen = threading.Barrier(8), []

    def look() -> None:
        start.wait()
        manager = get_default_manager()
        manager.ensure_initialized()
        seen.append((id(manager), len(manager.registry.get_implementations("rms_norm"))))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1


def _call_in_child(queue: Any) -> None:
    import torch

    from sglang_fl.dispatch import with_preference

    layer = type("Layer", (), {"weight": torch.ones(4), "variance_epsilon": 1e-6})()
    with with_preference("reference"):
        queue.put(call_op("rms_norm", layer, torch.ones(1, 4)).sum().item())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method: str) -> None:
    get_default_manager().ensure_initialized()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_call_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == pytest.approx(4.0, rel=1e-5)
    child.join()
    assert child.exitcode == 0


def test_fork_while_another_thread_holds_every_lock() -> None:
    """The child of such a fork would wait for ever for a thread that it does not have."""
    manager = get_default_manager()
    manager.ensure_initialized()
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with manager._lock, manager.registry._lock, PolicyManager.get_instance()._lock:
            holding.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    child = os.fork()
    if child == 0:
        set_global_policy(SelectionPolicy("reference"))
        manager.registry.register_impl(OpImpl("op", "default.flagos", D, say("flagos")))
        manager.bump_policy_epoch()
        manager.plan("op")
        os._exit(7)
    release.set()
    thread.join()
    for _ in range(100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock")
    assert os.waitstatus_to_exitcode(status) == 7


def test_fork_by_the_thread_that_holds_the_lock() -> None:
    """It lives on in the child, and lets go there."""
    lock = get_default_manager()._lock
    child = -1
    try:
        with lock:
            child = os.fork()
        if child == 0:
            with lock:
                os._exit(7)
    finally:
        if child == 0:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_core_imports_neither_sglang_nor_flaggems_nor_torch() -> None:
    code = """
import sys
import sglang_fl.dispatch, sglang_fl.dispatch.config, sglang_fl.dispatch.ops
sglang_fl.dispatch.get_default_manager().ensure_initialized()
sglang_fl.dispatch.get_default_manager().plan("rms_norm")
print(sorted({name.split(".")[0] for name in sys.modules} & {"sglang", "flag_gems", "torch", "triton", "torch_npu"}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
