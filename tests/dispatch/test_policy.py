# SPDX-License-Identifier: Apache-2.0
import asyncio
import contextvars
import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_fl.config import Settings, SettingsError, load_settings, unreachable
from sglang_fl.dispatch import (
    PREFER_DEFAULT,
    PREFER_REFERENCE,
    PREFER_VENDOR,
    PolicyManager,
    SelectionPolicy,
    get_policy,
    policy_context,
    policy_from_config,
    reset_global_policy,
    set_global_policy,
    with_allowed_vendors,
    with_denied_vendors,
    with_preference,
    with_strict_mode,
)
from sglang_fl.dispatch.policy import overrides


@pytest.fixture(autouse=True)
def known_policy() -> Iterator[None]:
    set_global_policy(SelectionPolicy())
    yield
    reset_global_policy()
    assert overrides.active == 0


class Listener:
    """Is told of each change of the policy, and raises an error at those that it refuses."""

    def __init__(
        self, refuses: Callable[[SelectionPolicy], bool] = lambda policy: False, why: str = "", error: type[BaseException] = RuntimeError
    ) -> None:
        self.seen: list[str] = []
        self.refuses, self.why, self.error = refuses, why, error  # a class: an error would keep the listener alive, in its traceback
        PolicyManager.get_instance().subscribe(self.look)

    def look(self) -> None:
        policy = get_policy()
        self.seen.append(policy.prefer)
        if self.refuses(policy):
            raise self.error(self.why)


def test_default_orders() -> None:
    orders = {prefer: SelectionPolicy(prefer).get_default_order() for prefer in (PREFER_DEFAULT, PREFER_VENDOR, PREFER_REFERENCE)}
    assert orders == {
        "flagos": ["flagos", "triton", "vendor", "reference"],
        "vendor": ["vendor", "flagos", "triton", "reference"],
        "reference": ["reference", "flagos", "triton", "vendor"],
    }


def test_unknown_words_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="'flagoss'; did you mean 'flagos'"):
        SelectionPolicy(prefer="flagoss")
    with pytest.raises(ValueError, match="'vendr'; did you mean 'vendor'"):
        SelectionPolicy(per_op_order=(("rms_norm", ("vendr",)),))
    with pytest.raises(ValueError, match="empty"):
        SelectionPolicy.from_dict(per_op_order={"rms_norm": []})


def test_from_dict_and_back() -> None:
    policy = SelectionPolicy.from_dict("vendor", True, {"b": ["flagos"], "a": ["vendor:x", "sglang"]}, ["m"], {"x", "m"})
    assert policy.per_op_order_dict == {"a": ["vendor:x", "sglang"], "b": ["flagos"]}
    assert policy.order_for("a") == ("vendor:x", "sglang")
    assert policy.order_for("other") == ("vendor", "flagos", "triton", "reference")
    assert policy.is_vendor_allowed("x")
    assert not policy.is_vendor_allowed("m")
    assert not policy.is_vendor_allowed("y")
    assert policy.is_vendor_allowed(None)


orders = st.builds(
    lambda ours, last: [*ours, *last] or ["sglang"],
    st.lists(st.sampled_from(["flagos", "triton", "vendor", "reference", "vendor:x", "impl:a.b"]), unique=True),
    st.sampled_from([[], ["sglang"]]),
).filter(lambda order: unreachable(order) is None)
policies = st.builds(
    SelectionPolicy.from_dict,
    prefer=st.sampled_from(["flagos", "vendor", "reference"]),
    strict=st.booleans(),
    per_op_order=st.dictionaries(st.sampled_from(["rms_norm", "silu_and_mul", "rotary_embedding"]), orders),
    deny_vendors=st.sets(st.sampled_from("abc")),
    allow_vendors=st.none() | st.sets(st.sampled_from("abc")).map(lambda allowed: allowed | {"d"}),
)


@given(policies, policies)
def test_equality_hash_and_fingerprint_agree(one: SelectionPolicy, other: SelectionPolicy) -> None:
    assert (one == other) == (one.fingerprint() == other.fingerprint())
    if one == other:
        assert hash(one) == hash(other)
    assert one != SelectionPolicy.from_dict(one.prefer, not one.strict, one.per_op_order_dict, one.deny_vendors, one.allow_vendors)


def test_order_of_the_dict_does_not_matter() -> None:
    one = SelectionPolicy.from_dict(per_op_order={"a": ["flagos"], "b": ["vendor"]})
    assert one == SelectionPolicy.from_dict(per_op_order={"b": ["vendor"], "a": ["flagos"]})


def test_global_policy() -> None:
    set_global_policy(SelectionPolicy("vendor"))
    assert get_policy().prefer == "vendor"
    reset_global_policy()
    assert get_policy() == PolicyManager.get_instance().get_global_policy()


def test_contexts_nest_and_end_on_errors() -> None:
    with policy_context(SelectionPolicy("vendor")):
        with pytest.raises(RuntimeError), with_preference("reference"):
            assert get_policy().prefer == "reference"
            raise RuntimeError
        assert get_policy().prefer == "vendor"
    assert get_policy().prefer == "flagos"


def test_derived_contexts() -> None:
    with with_denied_vendors("a"), with_denied_vendors("b"), with_allowed_vendors("c", "a"), with_strict_mode():
        policy = get_policy()
    assert (policy.deny_vendors, policy.allow_vendors, policy.strict) == ({"a", "b"}, {"a", "c"}, True)


def test_the_same_policy_can_be_entered_twice_at_once() -> None:
    policy = SelectionPolicy("vendor")
    with policy, policy_context(SelectionPolicy("reference")), policy:
        assert get_policy() is policy
    assert get_policy().prefer == "flagos"


def test_preference_sets_aside_single_orders() -> None:
    set_global_policy(SelectionPolicy.from_dict(per_op_order={"rms_norm": ["sglang"]}))
    with with_preference("reference"):
        assert get_policy().order_for("rms_norm") == ("reference", "flagos", "triton", "vendor")


def test_another_thread_never_sees_a_context() -> None:
    inside, seen, release = threading.Event(), [], threading.Event()

    def other() -> None:
        inside.wait()
        seen.append(get_policy().prefer)
        release.set()

    thread = threading.Thread(target=other)
    thread.start()
    with with_preference("vendor"):
        inside.set()
        release.wait()
    thread.join()
    assert seen == ["flagos"]


def test_another_task_never_sees_a_context() -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        entered, looked = asyncio.Event(), asyncio.Event()

        async def enters() -> None:
            with with_preference("vendor"):
                entered.set()
                await looked.wait()
                seen.append(get_policy().prefer)

        async def looks() -> None:
            await entered.wait()
            seen.append(get_policy().prefer)
            looked.set()

        await asyncio.gather(enters(), looks())
        return seen

    assert asyncio.run(main()) == ["flagos", "vendor"]


def test_a_listener_that_refuses_keeps_the_old_policy() -> None:
    listener = Listener(lambda policy: policy.prefer == "vendor", "no vendor here")
    with pytest.raises(RuntimeError, match="no vendor here"):
        set_global_policy(SelectionPolicy("vendor"))
    assert get_policy().prefer == "flagos"
    assert listener.seen == ["vendor", "flagos"]


def test_a_context_that_a_listener_refuses_was_never_entered() -> None:
    listener = Listener(lambda policy: overrides.active > 0, "not now")
    with pytest.raises(RuntimeError, match="not now"), with_preference("vendor"):
        pytest.fail("entered")
    assert get_policy().prefer == "flagos" and listener.seen
    assert overrides.active == 0


def test_a_context_left_from_another_context_is_still_counted_out() -> None:
    manager = policy_context(SelectionPolicy("vendor"))
    contextvars.copy_context().run(manager.__enter__)
    assert overrides.active == 1
    with pytest.raises(ValueError, match="different Context"):
        manager.__exit__(None, None, None)
    assert overrides.active == 0


def test_contexts_of_other_threads_are_not_in_a_forked_child() -> None:
    inside, release = threading.Event(), threading.Event()

    def hold() -> None:
        with with_preference("vendor"):
            inside.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with with_preference("reference"):
        assert overrides.active == 2
        child = os.fork()
        if child == 0:
            os._exit(overrides.active)
        _, status = os.waitpid(child, 0)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 1


def test_vendors_have_aliases() -> None:
    policy = SelectionPolicy(deny_vendors=frozenset({"cuda"}))
    assert not policy.is_vendor_allowed("nvidia") and not policy.is_vendor_allowed("cuda")
    assert SelectionPolicy(allow_vendors=frozenset({"npu"})).is_vendor_allowed("ascend")


def test_a_vendor_may_be_given_as_a_string() -> None:
    """As in a file; it is no set of letters."""
    assert SelectionPolicy(deny_vendors="nvidia", allow_vendors="ascend") == SelectionPolicy.from_dict(  # type: ignore[arg-type]
        deny_vendors="nvidia", allow_vendors="ascend"
    )
    assert not SelectionPolicy(deny_vendors="nvidia").is_vendor_allowed("nvidia")  # type: ignore[arg-type]


def test_orders_may_be_given_as_in_the_settings() -> None:
    wanted = SelectionPolicy(per_op_order=(("rms_norm", ("vendor", "sglang")), ("topk", ("sglang",))))
    assert SelectionPolicy(per_op_order={"rms_norm": "vendor|sglang", "topk": "sglang"}) == wanted  # type: ignore[arg-type]
    assert SelectionPolicy(per_op_order=(("topk", ["sglang"]), ("rms_norm", "vendor|sglang"))) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "error"), [({"strict": "no"}, "strict is 'no'"), ({"prefer": None}, "unknown preference None")])
def test_values_of_another_type(given: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        SelectionPolicy(**given)


@pytest.mark.parametrize("given", ["vendor", {"prefer": "vendor"}, 1])
def test_what_is_no_policy_is_refused_at_once(given: Any) -> None:
    before = get_policy()
    with pytest.raises(TypeError, match="expected a SelectionPolicy"):
        set_global_policy(given)
    with pytest.raises(TypeError, match="expected a SelectionPolicy"), policy_context(given):
        pass
    assert get_policy() == before and overrides.active == 0


@pytest.mark.parametrize(
    ("allow", "deny"), [({"nvidia"}, {"nvidia"}), ({"nvidia"}, {"cuda"}), ({"nvidia", "npu"}, {"cuda", "ascend", "metax"})]
)
def test_a_policy_that_leaves_no_vendor(allow: set[str], deny: set[str]) -> None:
    with pytest.raises(ValueError, match="no vendor is left: allow_vendors is"):
        SelectionPolicy.from_dict(allow_vendors=allow, deny_vendors=deny)
    assert SelectionPolicy.from_dict(allow_vendors={*allow, "mthreads"}, deny_vendors=deny).is_vendor_allowed("musa")


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("sglang|vendor", "the order for 'rms_norm': 'vendor' in 'sglang|vendor' is never tried: 'sglang' ends the order"),
        ("vendor|sglang|reference", "'reference' in 'vendor|sglang|reference' is never tried: 'sglang' ends the order"),
        ("vendor|flagos|vendor", "is never tried: 'vendor' comes before it"),
        ("sglang|sglang", "'sglang' ends the order"),
        ("vendor|vendor:nvidia", "'vendor' includes it"),
        ("vendor:nvidia|vendor:cuda", "'vendor:nvidia' includes it"),
        ("flagos|impl:default.flagos", "'flagos' includes it"),
        ("reference|impl:reference.torch", "'reference' includes it"),
    ],
)
def test_an_order_with_a_part_that_is_never_reached(order: str, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        SelectionPolicy.from_dict(per_op_order={"rms_norm": order.split("|")})


def test_the_hash_of_a_policy_from_another_process_is_this_ones() -> None:
    """Its words hash differently there."""
    code = (
        "import pickle, sys; from sglang_fl.dispatch import SelectionPolicy as P;"
        "p = P('vendor', per_op_order={'rms_norm': 'vendor|sglang'}, deny_vendors='metax'); sys.stdout.buffer.write(pickle.dumps(p))"
    )
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, check=True)
    theirs, ours = pickle.loads(ran.stdout), SelectionPolicy("vendor", False, {"rms_norm": "vendor|sglang"}, "metax")  # type: ignore[arg-type]
    assert theirs == ours and hash(theirs) == hash(ours) and {ours: 1}[theirs] == 1
    assert copy.deepcopy(ours) == ours


def test_an_interrupt_of_a_listener_keeps_the_old_policy_everywhere() -> None:
    first, _second = (Listener(lambda policy: policy.prefer == "vendor", error=KeyboardInterrupt) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        set_global_policy(SelectionPolicy("vendor"))
    assert get_policy().prefer == "flagos" and first.seen[-1] == "flagos"


def test_settings_that_a_listener_refuses_are_not_in_force() -> None:
    manager = PolicyManager.get_instance()
    reset_global_policy()
    manager.use_settings(Settings())
    refuses, other = Listener(lambda policy: policy.strict, "not strict"), Listener()
    with pytest.raises(RuntimeError, match="not strict"):
        manager.use_settings(Settings(strict=True, prefer="vendor"))
    assert get_policy() == SelectionPolicy() and refuses.seen[-1] == other.seen[-1] == "flagos"


def test_policy_from_config(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("prefer: vendor\nstrict: true\nop_backends:\n  rms_norm: [sglang]\ndeny_vendors: [metax]\n")
    policy = policy_from_config(path)
    assert policy == SelectionPolicy.from_dict("vendor", True, {"rms_norm": ["sglang"]}, ["metax"])
    with policy_from_config(path):
        assert get_policy() == policy
    with pytest.raises(SettingsError, match=r"^sglang-fl: there is no file"):
        policy_from_config(tmp_path / "nope.yaml")


def test_policy_from_config_merges_with_the_profile_of_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server would that reads the same file."""
    path = tmp_path / "policy.yaml"
    path.write_text("strict: true\n")
    for variables in ({"SGLANG_FL_PLATFORM": "ascend"}, {"SGLANG_FL_PLATFORM": "nvidia"}):
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        server = load_settings({**variables, "SGLANG_FL_CONFIG": str(path)})
        assert server.op_backends, "the profile has orders"
        assert policy_from_config(path) == SelectionPolicy.from_settings(server)
    monkeypatch.setenv("SGLANG_FL_STRICT", "0")
    assert policy_from_config(path).strict, "the file says what is wanted, not the environment"


def test_policy_from_config_hears_gems_vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("prefer: reference\n")
    handed: list[dict[str, str]] = []
    real = load_settings
    monkeypatch.setattr("sglang_fl.dispatch.policy.load_settings", lambda environ, **more: handed.append(environ) or real(environ, **more))
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    policy_from_config(path)
    assert handed[0] == {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_FL_CONFIG": str(path)}


def test_policy_of_the_settings_when_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_FL_PREFER", "vendor")
    monkeypatch.setenv("SGLANG_FL_PER_OP", "rms_norm=reference")
    monkeypatch.setenv("SGLANG_FL_DENY_VENDORS", "metax")
    fresh = PolicyManager()
    assert fresh.get_global_policy() == SelectionPolicy.from_dict("vendor", False, {"rms_norm": ["reference"]}, ["metax"])


def test_the_manager_has_the_names_that_flagos_backends_use() -> None:
    manager = PolicyManager.get_instance()
    manager.reset_global_policy()
    before, default = manager.get_policy_epoch(), manager.get_policy()
    manager.set_global_policy(SelectionPolicy("vendor"))
    after = manager.get_policy_epoch()
    assert manager.get_policy().prefer == "vendor" and after != before
    manager.reset_global_policy()
    assert manager.get_policy() == default and manager.get_policy_epoch() not in (before, after)
