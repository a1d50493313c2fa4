# SPDX-License-Identifier: Apache-2.0
"""Switches: the replacements that the settings select on this machine, and the settings that turn single ones off."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ..config import OPTIONS, PROFILES, Settings, read_mapping
from ..device import Device, has_triton
from ..dispatch.catalog import classes_of, names_in_lists
from ..dispatch.kernel_implementations import exclusion_reason, is_kernel
from ..dispatch.manager import OpManager
from ..dispatch.policy import SelectionPolicy
from ..startup.words import used_functions

#: Prefixes of switches: a FlagGems function of Layer 1, an operator of Layer 2. Some share a name.
FUNCTION, OPERATOR = "aten:", "op:"
#: The weight that each profile adds to a function that it lists as broken.
_KNOWN_BAD = 8.0
#: The weight of a switch of which a model's report says nothing: the model does not call it.
_NOT_CALLED = 0.1


@dataclass(frozen=True)
class Switches:
    """The switches of a machine.

    Attributes:
        names: ``aten:add``, ``op:rms_norm``.
        settings: those in force, in which all are on.
    """

    names: tuple[str, ...]
    settings: Settings

    def environ(self, on: Set[str]) -> dict[str, str | None]:
        """The environment variables that leave exactly these on. None: the variable must be unset."""
        functions, used = _plain(on, FUNCTION), _plain(self.names, FUNCTION)
        off = _plain(set(self.names) - on, OPERATOR)
        changed: dict[str, str | None] = {}
        if not functions and used:
            changed["USE_FLAGGEMS"] = "0"
        elif len(functions) < len(used):
            changed |= {"SGLANG_FL_FLAGOS_WHITELIST": ",".join(functions), "SGLANG_FL_FLAGOS_BLACKLIST": None}
        if off:
            changed["SGLANG_FL_PER_OP"] = self._per_op(off)
        return changed

    def exclusion(self, switches: Iterable[str], classes: Sequence[str] = ()) -> str:
        """The settings that turn these off: YAML for the user's file, or variables where the environment overrides the file.

        Args:
            classes: layer classes and functions of SGLang, if there is no ``oot_whitelist``.
        """
        switches = tuple(switches)
        lists, off = self._without(_plain(switches, FUNCTION)), _plain(switches, OPERATOR)
        if classes:
            lists["oot_blacklist"] = [*(self.settings.oot_blacklist or ()), *sorted(classes)]
        lines = []
        for key, names in lists.items():
            if self._from_environment(key):
                lines.append(f"{OPTIONS[key].env}={','.join(names)}" if names else "USE_FLAGGEMS=0")
            else:
                lines.append(f"{key}: [{', '.join(names)}]")
        if off and self._from_environment("prefer", "op_backends"):
            lines.append(f"SGLANG_FL_PER_OP='{self._per_op(off)}'")
        elif off:
            lines += ["op_backends:", *(f"  {op}: [sglang]" for op in off)]
        return "\n".join(lines)

    def _per_op(self, off: Iterable[str]) -> str:
        """The user's orders, and these operators left to SGLang."""
        orders = {op: "|".join(order) for op, order in self.settings.op_backends} | dict.fromkeys(off, "sglang")
        return ";".join(f"{op}={order}" for op, order in orders.items())

    def _without(self, functions: Sequence[str]) -> dict[str, list[str]]:
        """The whitelist without these functions, or the blacklist with them, by its key."""
        if not functions:
            return {}
        if self.settings.flagos_whitelist is not None:
            return {"flagos_whitelist": [name for name in self.settings.flagos_whitelist if name not in functions]}
        return {"flagos_blacklist": [*(self.settings.flagos_blacklist or ()), *functions]}

    def _from_environment(self, *settings: str) -> bool:
        return any(self.settings.source(name).where == OPTIONS[name].env for name in settings)


def _plain(switches: Iterable[str], kind: str) -> list[str]:
    """The names of one kind, without the prefix."""
    return sorted(name.removeprefix(kind) for name in switches if name.startswith(kind))


def switches_in_force(settings: Settings, device: Device, manager: OpManager) -> Switches:
    """The switches that these settings select here, as far as known before a model is loaded."""
    manager.use(settings, device)
    policy = SelectionPolicy.from_settings(settings)
    operators = [op for op in manager.registry.list_operators() if manager.plan(op, policy).candidates and _is_switch(op, settings, device)]
    return Switches((*(OPERATOR + op for op in operators), *(FUNCTION + name for name in used_functions(settings, device))), settings)


def _is_switch(op: str, settings: Settings, device: Device) -> bool:
    """Whether an operator can be turned off: its layers are bound, and SGLang's own kernel, if it needs Triton, can run."""
    if is_kernel(op):
        return has_triton(device) and exclusion_reason(settings, op) is None
    return any(settings.exclusion_reason(names_in_lists(name, op)) is None for name in classes_of(op))


def prior_weights(names: Iterable[str], suspicion: Mapping[str, float] | None) -> Mapping[str, float]:
    """The prior weight of each switch. Functions that a profile lists as broken weigh more.

    Args:
        suspicion: by switch, of a report by ``sglang-fl bisect MODEL --json``.
    """
    listed: Counter[str] = Counter()
    for profile in sorted(PROFILES.glob("*.yaml")):
        entry = read_mapping(profile, what="a profile", problems=[]).get("flagos_broken")
        listed.update((entry.value or ()) if entry else ())
    known = {name: 1.0 + _KNOWN_BAD * listed[name.removeprefix(FUNCTION)] * name.startswith(FUNCTION) for name in names}
    return known if suspicion is None else {name: weight * suspicion.get(name, _NOT_CALLED) for name, weight in known.items()}
