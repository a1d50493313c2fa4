# SPDX-License-Identifier: Apache-2.0
"""OpManager: selects the implementation of an operator by the policy, and calls it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Settings, settings_in_force
from ..device import Device
from ..utils.suggest import suggest
from .builtin_ops import Discovery, discover, known_words
from .locks import ForkSafeLock
from .logger_manager import get_logger
from .policy import PolicyManager, SelectionPolicy, get_policy
from .registry import OpRegistry
from .types import SGLANG, OpImpl, Refusal, device_here, match_token

logger = get_logger()


@dataclass(frozen=True)
class Plan:
    """The implementations of an operator that a policy allows on this machine.

    Attributes:
        candidates: the implementations that can run, in the order to try them.
        to_sglang: ``sglang`` follows them in the order; words after it are never tried.
        passed_over: (implementation id or word of the order, reason) of what cannot be used.
    """

    op: str
    order: tuple[str, ...]
    candidates: tuple[OpImpl, ...]
    to_sglang: bool
    passed_over: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        """Why there is no candidate, in one line."""
        reasons = "; ".join(f"{what}: {reason}" for what, reason in self.passed_over) or "nothing is registered for it"
        return f"order {'|'.join(self.order)}: {reasons}"


def is_capturing() -> bool:
    """Whether the current device is recording a graph."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return False
    check = getattr(torch.get_device_module(), "is_current_stream_capturing", None)
    return bool(check is not None and check())


#: Errors that an implementation's Python code raises, not the device: a capture can continue.
_NOT_OF_THE_DEVICE = (ValueError, TypeError, NotImplementedError)


class OpManager:
    """Resolves operators and calls them. Safe from threads and after a fork."""

    def __init__(self, registry: OpRegistry | None = None):
        self.registry = registry or OpRegistry()
        self.discovery: Discovery | None = Discovery() if registry is not None else None
        self._plans: dict[tuple[str, SelectionPolicy], Plan] = {}
        self._plans_version = -1
        self._lock = ForkSafeLock()
        self._is_discovering = False
        self.given: tuple[Settings, Device] | None = None
        self._in_use: tuple[Settings, Device] | None = None
        self._unavailable: dict[OpImpl, str | None] = {}
        self._reported: set[tuple[str, str, str]] = set()
        self._checked: set[SelectionPolicy] = set()

    def use(self, settings: Settings, device: Device) -> None:
        """Use these settings and this device to decide which implementations are available.

        Without this call, a manager uses the settings of the process and the device that it detects. If a bound layer refuses the
        change, under a strict policy, the change is undone and the layer's error raised.
        """
        before, self.given = self.given, (settings, device)
        try:
            self.bump_policy_epoch()
        except BaseException:
            self.restore(before)
            raise

    def restore(self, given: tuple[Settings, Device] | None) -> None:
        """Go back to what ``given`` was before a :meth:`use`."""
        self.given = given
        self.bump_policy_epoch()

    def ensure_initialized(self, plugin_modules: Sequence[str] | None = None) -> None:
        """Register every backend there is, once.

        Args:
            plugin_modules: further modules to ask; None: those that the settings name.

        Raises:
            RuntimeError: two backends claim one implementation id.
        """
        conflicts = self.discover(plugin_modules).conflicts
        if conflicts:
            raise RuntimeError("; ".join(conflicts))

    def discover(self, plugin_modules: Sequence[str] | None = None) -> Discovery:
        """As :meth:`ensure_initialized`; problems are in the returned value."""
        if self.discovery is None:
            with self._lock:
                if self.discovery is None:
                    if self._is_discovering:  # by a package that is being imported: its failure, not ours
                        raise RuntimeError("operators cannot be resolved while backends are being registered")
                    if plugin_modules is None:
                        plugin_modules = settings_in_force().plugin_modules or ()
                    self._is_discovering = True
                    try:
                        self.discovery = discover(self.registry, plugin_modules)
                    finally:
                        self._is_discovering = False
        return self.discovery

    def plan(self, op_name: str, policy: SelectionPolicy | None = None) -> Plan:
        """The implementations that the policy (None: the one in force here) allows for an operator."""
        self.ensure_initialized()
        policy = policy or get_policy()
        if self._plans_version != self.registry.version:
            self.bump_policy_epoch()
        found = self._plans.get((op_name, policy))
        if found is None:
            self._warn_of_names(policy)
            with self._lock:
                found = self._plans[op_name, policy] = self._make_plan(op_name, policy)
        return found

    def _warn_of_names(self, policy: SelectionPolicy) -> None:
        """Warn once of unknown operators and vendors in a policy: denying "nvdia" denies nobody."""
        if policy in self._checked:
            return
        self._checked.add(policy)
        words = known_words(self.registry)
        vendors = (*policy.deny_vendors, *(policy.allow_vendors or ()))
        problems = [
            *(words.problem_with_operator(op, order) for op, order in policy.per_op_order),
            *(words.problem_with_token(token) for _, order in policy.per_op_order for token in order),
            *(words.problem_with("vendors", vendor) for vendor in sorted(vendors)),
        ]
        for problem in filter(None, problems):
            logger.warning("a policy of this process: %s", problem)

    def _make_plan(self, op_name: str, policy: SelectionPolicy) -> Plan:
        order = policy.order_for(op_name)
        impls = sorted(self.registry.get_implementations(op_name), key=lambda impl: (-impl.priority, impl.impl_id))
        candidates: list[OpImpl] = []
        passed_over: dict[str, str] = {}
        to_sglang = False
        for token in order:
            if token == SGLANG:
                to_sglang = True
                break
            matching = [impl for impl in impls if match_token(impl, token)]
            if not matching:
                passed_over[token] = "no backend implements it"
            for impl in matching:
                if impl in candidates:
                    continue
                allowed = policy.is_vendor_allowed(impl.vendor)
                reason = self._why_unavailable(impl) if allowed else f"vendor {impl.vendor} is not allowed"
                if reason is None:
                    candidates.append(impl)
                else:
                    passed_over[impl.impl_id] = reason
        return Plan(op_name, order, tuple(candidates), to_sglang, tuple(passed_over.items()))

    def _why_unavailable(self, impl: OpImpl) -> str | None:
        """As :meth:`OpImpl.why_unavailable`, asked once."""
        if impl not in self._unavailable:
            if self._in_use is None:
                self._in_use = self.given or (settings_in_force(), device_here())
            self._unavailable[impl] = impl.why_unavailable(*self._in_use)
        return self._unavailable[impl]

    def resolve_candidates(self, op_name: str) -> list[OpImpl]:
        """The implementations that can run, in the order to try them.

        Raises:
            RuntimeError: there is none, or the order comes to ``sglang`` first.
        """
        plan = self.plan(op_name)
        if not plan.candidates:
            raise RuntimeError(self._nothing_for(plan))
        return list(plan.candidates)

    def _nothing_for(self, plan: Plan) -> str:
        if plan.to_sglang:
            return (
                f"No available implementation for op={plan.op!r}: its order {'|'.join(plan.order)} leaves it to SGLang, "
                "which a call by name cannot do: only layers of a served model can be left to it"
            )
        hint = suggest(plan.op, self.registry.list_operators()) if not self.registry.get_implementations(plan.op) else ""
        return f"No available implementation for op={plan.op!r}: {plan.describe()}{hint}"

    def resolve(self, op_name: str) -> Callable[..., Any]:
        """The function of the first implementation in order. Raises as :meth:`resolve_candidates`."""
        return self.resolve_candidates(op_name)[0].function

    def call(self, op_name: str, *args: Any, **kwargs: Any) -> Any:
        """Run an operator on the first implementation in order.

        One that raises is reported. The next in order is tried if it refused the call (:class:`Refusal`), or is declared not to
        write its inputs and, while a graph is captured, raised a ValueError, TypeError or NotImplementedError, which
        are no errors of the device; not under a strict policy.

        Raises:
            RuntimeError: there is no implementation, or all of them failed.
            Exception: what the implementation raised, where no other may be tried.
        """
        policy = get_policy()
        plan = self._plans.get((op_name, policy)) if self._plans_version == self.registry.version else None
        if plan is None:
            plan = self.plan(op_name, policy)
        if not plan.candidates:
            raise RuntimeError(self._nothing_for(plan))
        impl = plan.candidates[0]
        try:
            return impl.function(*args, **kwargs)
        except Exception as error:
            return self.call_after_failure(plan, policy, impl, error, lambda other: other.function(*args, **kwargs))

    def call_after_failure(
        self,
        plan: Plan,
        policy: SelectionPolicy,
        failed: OpImpl,
        error: Exception,
        call: Callable[[OpImpl], Any],
        call_sglang: Callable[[], Any] | None = None,
    ) -> Any:
        """Report a failure and run ``call`` on the next implementations, where that is allowed.

        ``call_sglang`` runs SGLang's own forward, if the order ends with ``sglang`` and the caller has one.
        """
        self.report_failure(failed, error)
        failures = [(failed, error)]
        others = plan.candidates[plan.candidates.index(failed) + 1 :] if failed in plan.candidates else ()
        for other in others:
            if not self._may_retry(*failures[-1], policy):
                break
            try:
                result = call(other)
            except Exception as next_error:
                self.report_failure(other, next_error)
                failures.append((other, next_error))
            else:
                return result
        else:
            if plan.to_sglang and call_sglang is not None and self._may_retry(*failures[-1], policy):
                try:
                    return call_sglang()
                except Exception as own_error:
                    own_error.add_note(f"sglang-fl: SGLang's own was called since {_in_words(failures)}")
                    raise
        if len(failures) == 1:
            raise error
        raise RuntimeError(f"All implementations failed for op={plan.op!r}: {_in_words(failures)}") from failures[-1][1]

    def _may_retry(self, failed: OpImpl, error: Exception, policy: SelectionPolicy) -> bool:
        if policy.strict or isinstance(error, Refusal):
            return not policy.strict
        return not failed.writes_inputs and (isinstance(error, _NOT_OF_THE_DEVICE) or not is_capturing())

    def report_failure(self, impl: OpImpl, error: BaseException) -> None:
        """Log that an implementation raised, each message once, and add a note to the error."""
        error.add_note(f"sglang-fl: raised by {impl.impl_id} for {impl.op_name}")
        key = (impl.op_name, impl.impl_id, f"{type(error).__name__}: {error}")
        if key not in self._reported:
            self._reported.add(key)
            logger.error("%s: %s raised %s", impl.op_name, impl.impl_id, key[2])

    def bump_policy_epoch(self) -> None:
        """Invalidate all plans, so that they are made again, for bound layers too."""
        with self._lock:
            self._plans, self._unavailable, self._in_use = {}, {}, None
            changed = self._plans_version != -1
            self._plans_version = self.registry.version
        if changed:
            PolicyManager.get_instance().notify()


def _in_words(failures: Sequence[tuple[OpImpl, Exception]]) -> str:
    return "; ".join(f"{impl.impl_id}: {type(error).__name__}: {error}" for impl, error in failures)


_default = OpManager()


def get_default_manager() -> OpManager:
    """The process's manager."""
    return _default


def reset_default_manager() -> None:
    """Put a new manager in the place of the process's."""
    global _default
    _default = OpManager()


def call_op(op_name: str, *args: Any, **kwargs: Any) -> Any:
    """Run an operator; see :meth:`OpManager.call`."""
    return get_default_manager().call(op_name, *args, **kwargs)


def resolve_op(op_name: str) -> Callable[..., Any]:
    """The function that the policy picks for an operator; see :meth:`OpManager.resolve`."""
    return get_default_manager().resolve(op_name)
