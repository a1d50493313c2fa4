# SPDX-License-Identifier: Apache-2.0
"""Which implementation goes first: a policy, the one in force, and the ways to change it.

A change with :func:`set_global_policy` is everywhere at once. A change with a context manager is in
its own thread or task only.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..config import CONFIG_FILE, Settings, SettingsError, Words, load_settings, plugin_modules, settings_in_force, unreachable
from ..device import canonical, target_problem
from ..utils.suggest import suggest
from .builtin_ops import discover, known_words
from .catalog import OPERATOR_OF_CLASS
from .locks import ForkSafeLock
from .registry import OpRegistry
from .types import device_here

PREFER_DEFAULT = "flagos"
PREFER_VENDOR = "vendor"
PREFER_REFERENCE = "reference"

_DEFAULT_ORDERS = {
    PREFER_DEFAULT: ("flagos", "triton", "vendor", "reference"),
    PREFER_VENDOR: ("vendor", "flagos", "triton", "reference"),
    PREFER_REFERENCE: ("reference", "flagos", "triton", "vendor"),
}
#: Their references do not replace SGLang's Triton kernels: on a device with Triton they stay with SGLang by default. So do kernels of
#: SGLang's that have a name of their own, ``sglang.module:name``.
_ELSE_SGLANG = frozenset({"fused_sigmoid_gating_delta_rule_update", "causal_conv1d_fn", "causal_conv1d_update"})


#: Variables that decide which platform's profile is read.
_PLATFORM_VARIABLES = ("SGLANG_FL_PLATFORM", "GEMS_VENDOR", "SGLANG_USE_CPU_ENGINE")


def _check_order(op: str, order: tuple[str, ...]) -> None:
    """Raises ValueError for an invalid order. The manager checks the names in it."""
    problems = [*filter(None, map(Words().problem_with_token, order)), unreachable(order), None if order else "it is empty"]
    if message := next(filter(None, problems), None):
        raise ValueError(f"the order for {op!r}: {message}")


def _names(given: Any) -> frozenset[str]:
    return frozenset((given,) if isinstance(given, str) else given)


@dataclass(frozen=True)
class SelectionPolicy:
    """An order of preference, as a value: hashable, and usable in a ``with`` statement.

    >>> policy = SelectionPolicy(prefer="vendor", per_op_order={"rms_norm": "flagos|sglang"})
    >>> policy.order_for("rms_norm"), policy.order_for("silu_and_mul")
    (('flagos', 'sglang'), ('vendor', 'flagos', 'triton', 'reference'))

    Attributes:
        prefer: ``flagos``, ``vendor`` or ``reference``: the kind that goes first.
        strict: an implementation that fails stops the caller; the next in order is not tried.
        per_op_order: (operator, order) pairs, or a mapping. An order, such as ``"vendor|sglang"``, lists all that may be used.
        deny_vendors: vendors whose implementations may not be used; a string is one vendor.
        allow_vendors: if given, the only vendors whose implementations may be used.

    Raises:
        ValueError: an unknown preference or backend; an order that is empty, names a backend twice or continues after ``sglang``;
            no vendor is both allowed and not denied. (For unknown operators and vendors the manager logs a warning.)
        TypeError: ``strict`` is not a bool.
    """

    prefer: str = PREFER_DEFAULT
    strict: bool = False
    per_op_order: tuple[tuple[str, tuple[str, ...]], ...] = ()
    deny_vendors: frozenset[str] = frozenset()
    allow_vendors: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.prefer not in _DEFAULT_ORDERS:
            raise ValueError(f"unknown preference {self.prefer!r}{suggest(str(self.prefer), list(_DEFAULT_ORDERS))}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict is {self.strict!r}, and must be True or False")
        given = self.per_op_order.items() if isinstance(self.per_op_order, Mapping) else self.per_op_order
        named = ((OPERATOR_OF_CLASS.get(name, name), order) for name, order in given)
        pairs = tuple(sorted((op, tuple(order.split("|") if isinstance(order, str) else order)) for op, order in named))
        for op, order in pairs:
            _check_order(op, order)
        object.__setattr__(self, "per_op_order", pairs)
        object.__setattr__(self, "deny_vendors", _names(self.deny_vendors))
        if self.allow_vendors is not None:
            object.__setattr__(self, "allow_vendors", _names(self.allow_vendors))
            if self.allow_vendors and not any(map(self.is_vendor_allowed, self.allow_vendors)):
                allowed, denied = (", ".join(sorted(names)) for names in (self.allow_vendors, self.deny_vendors))
                raise ValueError(f"no vendor is left: allow_vendors is {allowed}, and deny_vendors is {denied}")
        object.__setattr__(self, "_hash", hash((self.prefer, self.strict, self.per_op_order, self.deny_vendors, self.allow_vendors)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        # Strings hash differently in every process: a copy works out its own.
        return type(self), (self.prefer, self.strict, self.per_op_order, self.deny_vendors, self.allow_vendors)

    @classmethod
    def from_dict(
        cls,
        prefer: str = PREFER_DEFAULT,
        strict: bool = False,
        per_op_order: Mapping[str, list[str] | tuple[str, ...]] | None = None,
        deny_vendors: Any = None,
        allow_vendors: Any = None,
    ) -> "SelectionPolicy":
        """Make a policy from a dict of orders and any iterables of vendors."""
        return cls(prefer, strict, per_op_order or (), deny_vendors or frozenset(), allow_vendors)  # type: ignore[arg-type]  # any shape

    @classmethod
    def from_settings(cls, settings: Settings) -> "SelectionPolicy":
        return cls.from_dict(settings.prefer, settings.strict, dict(settings.op_backends), settings.deny_vendors, settings.allow_vendors)

    @property
    def per_op_order_dict(self) -> dict[str, list[str]]:
        return {op: list(order) for op, order in self.per_op_order}

    def get_default_order(self) -> list[str]:
        """The order for operators that have none of their own."""
        return list(_DEFAULT_ORDERS[self.prefer])

    def order_for(self, op_name: str) -> tuple[str, ...]:
        """The order for an operator."""
        given = dict(self.per_op_order).get(op_name)
        if given is not None:
            return given
        default = _DEFAULT_ORDERS[self.prefer]
        return (*default, "sglang") if op_name in _ELSE_SGLANG or target_problem(op_name) is None else default

    def is_vendor_allowed(self, vendor: str | None) -> bool:
        """Whether a vendor's implementations may be used; those of no vendor always may."""
        if vendor is None:
            return True
        name = canonical(vendor)
        denied = name in map(canonical, self.deny_vendors)
        return not denied and (self.allow_vendors is None or name in map(canonical, self.allow_vendors))

    def fingerprint(self) -> str:
        """Equal for equal policies, in every process."""
        allowed = self.allow_vendors and sorted(self.allow_vendors)
        text = repr((self.prefer, self.strict, self.per_op_order, sorted(self.deny_vendors), allowed))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __enter__(self) -> "SelectionPolicy":
        context = policy_context(self)
        context.__enter__()
        _entered.set((*_entered.get(), context))
        return self

    def __exit__(self, *error: Any) -> None:
        *rest, context = _entered.get()
        _entered.set(tuple(rest))
        context.__exit__(*error)


class Overrides:
    """How many ``policy_context`` blocks are open in the process.

    Bound layers read ``active`` on every call, and look at the context variable only when it is not
    zero: an attribute read costs a fraction of ``ContextVar.get``. A forward that an open context selected itself reads another one.
    """

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active = 0


overrides = Overrides()
#: The policies of the contexts that are open in this thread or task, the innermost last.
_open: ContextVar[tuple[SelectionPolicy, ...]] = ContextVar("sglang_fl_policies", default=())
#: The contexts of the policies that a ``with`` statement has entered itself.
_entered: ContextVar[tuple[AbstractContextManager[SelectionPolicy], ...]] = ContextVar("sglang_fl_policies_entered", default=())


class PolicyManager:
    """The policy of the process. One instance; see :meth:`get_instance`."""

    _instance: ClassVar["PolicyManager"]

    def __init__(self) -> None:
        self._global: SelectionPolicy | None = None
        self._from_settings: SelectionPolicy | None = None
        self._lock = ForkSafeLock()
        # Of its own, since listeners read the policy under their own locks and are called under ours.
        self._settings_lock = ForkSafeLock()
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._epoch = 0

    @classmethod
    def get_instance(cls) -> "PolicyManager":
        return cls._instance

    def get_policy(self) -> SelectionPolicy:
        """The policy in force here: the innermost context's, else the global one, else the settings'."""
        here = _open.get()
        return here[-1] if here else self.get_global_policy()

    def get_global_policy(self) -> SelectionPolicy:
        """The policy in force outside of context managers."""
        policy = self._global or self._from_settings
        if policy is None:
            with self._settings_lock:
                if self._from_settings is None:
                    self._from_settings = SelectionPolicy.from_settings(settings_in_force())
                policy = self._global or self._from_settings
        return policy

    def use_settings(self, settings: Settings) -> None:
        """Use these settings' policy where no other is set.

        Refused as in :meth:`set_global_policy`.
        """
        with self._lock:
            self._change(self._global, SelectionPolicy.from_settings(settings))

    def set_global_policy(self, policy: SelectionPolicy | None) -> None:
        """Put a policy in force for the whole process; None: what the settings say.

        If a listener refuses it (a strict policy that a layer cannot follow), the old one stays and
        the listener's error is raised.

        Raises:
            TypeError: it is not a SelectionPolicy.
        """
        if policy is not None:
            _check_policy(policy)
        with self._lock:
            self._change(policy, self._from_settings)

    def reset_global_policy(self) -> None:
        """Back to what the settings say."""
        self.set_global_policy(None)

    def get_policy_epoch(self) -> int:
        """A number that changes with each change of the policy."""
        return self._epoch

    def _change(self, policy: SelectionPolicy | None, from_settings: SelectionPolicy | None) -> None:
        before = self._global, self._from_settings
        self._global, self._from_settings = policy, from_settings
        try:
            self.notify()
        except BaseException:
            self._global, self._from_settings = before
            self.notify()
            raise

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call a method whenever the global policy, or whether any context is open, changes.

        Its object is not kept alive.
        """
        with self._lock:
            self._listeners = [known for known in self._listeners if known() is not None]
            self._listeners.append(weakref.WeakMethod(listener))

    def notify(self) -> None:
        """Notify the listeners.

        Raises:
            Exception: the first error of a listener that refuses the change; all others were notified.
        """
        self._epoch += 1
        refusals = []
        for known in tuple(self._listeners):
            listener = known()
            try:
                if listener is not None:
                    listener()
            except Exception as error:
                refusals.append(error)
        try:
            if refusals:
                raise refusals[0]
        finally:
            del refusals  # it would keep the listeners alive, in the error's traceback

    def count_override(self, step: int) -> None:
        with self._lock:
            overrides.active += step
            if overrides.active == (1 if step > 0 else 0):
                self.notify()


def _check_policy(policy: SelectionPolicy) -> None:
    if not isinstance(policy, SelectionPolicy):
        raise TypeError(f"expected a SelectionPolicy, such as SelectionPolicy(prefer='vendor'), and got {policy!r}")


PolicyManager._instance = PolicyManager()


def get_policy() -> SelectionPolicy:
    """The policy in force in this thread or task."""
    return PolicyManager.get_instance().get_policy()


def set_global_policy(policy: SelectionPolicy) -> None:
    """Put a policy in force everywhere in the process, also for layers already bound."""
    PolicyManager.get_instance().set_global_policy(policy)


def reset_global_policy() -> None:
    """Back to what the settings say."""
    PolicyManager.get_instance().reset_global_policy()


@contextmanager
def policy_context(policy: SelectionPolicy) -> Iterator[SelectionPolicy]:
    """Put a policy in force inside the block, in this thread or task only."""
    _check_policy(policy)
    manager, token = PolicyManager.get_instance(), _open.set((*_open.get(), policy))
    try:
        manager.count_override(+1)
        yield policy
    finally:
        try:
            _open.reset(token)
        finally:
            manager.count_override(-1)


def policy_from_config(path: str | Path) -> SelectionPolicy:
    """The policy that a YAML file describes; also usable as ``with policy_from_config(path):``.

    Keys that the file lacks are taken from the profile of this machine's platform.

    Raises:
        SettingsError: the file is missing or broken, or says something unknown.
    """
    environ = {name: os.environ[name] for name in _PLATFORM_VARIABLES if name in os.environ} | {CONFIG_FILE: str(path)}
    read = partial(load_settings, environ, device=device_here())
    try:
        return SelectionPolicy.from_settings(read(words=known_words()))
    except SettingsError:  # perhaps of a name that an installed package has
        registry = OpRegistry()
        discover(registry, plugin_modules(os.environ))
    try:
        return SelectionPolicy.from_settings(read(words=known_words(registry)))
    except SettingsError as error:
        raise SettingsError([problem.removeprefix(f"{CONFIG_FILE}: ") for problem in error.problems]) from None


def with_preference(prefer: str) -> SelectionPolicy:
    """The policy in force here with another preference, for a ``with`` statement.

    A preference is for every operator: orders for single operators are dropped.
    """
    return replace(get_policy(), prefer=prefer, per_op_order=())


def with_strict_mode(strict: bool = True) -> SelectionPolicy:
    """The policy in force here, strict, for a ``with`` statement."""
    return replace(get_policy(), strict=strict)


def with_allowed_vendors(*vendors: str) -> SelectionPolicy:
    """The policy in force here with these vendors only, for a ``with`` statement."""
    return replace(get_policy(), allow_vendors=frozenset(vendors))


def with_denied_vendors(*vendors: str) -> SelectionPolicy:
    """The policy in force here without these vendors, for a ``with`` statement."""
    policy = get_policy()
    return replace(policy, deny_vendors=policy.deny_vendors | frozenset(vendors))


def _count_in_child() -> None:
    # The contexts that other threads had open are not in the child.
    overrides.active = len(_open.get())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_in_child)
