# SPDX-License-Identifier: Apache-2.0
"""Switches: what the settings in force put in SGLang's place on this machine, each with a name, and the settings that leave some on."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ..config import OPTIONS, PROFILES, Settings, read_mapping
from ..device import Device
from ..dispatch.bridge.catalog import classes_of, names_in_lists
from ..dispatch.kernel_implementations import exclusion_reason, has_triton, is_kernel
from ..dispatch.manager import OpManager
from ..dispatch.policy import SelectionPolicy
from ..startup.words import used_functions

#: What a switch's name begins with: a FlagGems function of Layer 1, an operator of Layer 2. Some have the same name.
FUNCTION, OPERATOR = "aten:", "op:"
#: How much more suspicious each profile makes a function that it lists as broken on its chip.
_KNOWN_BAD = 8.0


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
        """The variables that leave exactly these on; None: the variable must not be set."""
        functions, used = _plain(on, FUNCTION), _plain(self.names, FUNCTION)
        off = [op for op in _plain(self.names, OPERATOR) if OPERATOR + op not in on]
        changed: dict[str, str | None] = {}
        if not functions and used:
            changed["USE_FLAGGEMS"] = "0"
        elif len(functions) < len(used):
            changed |= {"SGLANG_FL_FLAGOS_WHITELIST": ",".join(functions), "SGLANG_FL_FLAGOS_BLACKLIST": None}
        if off:
            orders = {op: "|".join(order) for op, order in self.settings.op_backends} | dict.fromkeys(off, "sglang")
            changed["SGLANG_FL_PER_OP"] = ";".join(f"{op}={order}" for op, order in orders.items())
        return changed

    def exclusion(self, switches: Iterable[str]) -> str:
        """The settings that leave these off: YAML for a user's file, or variables where the environment would override the file."""
        lists, orders = self._without(_plain(switches, FUNCTION)), dict.fromkeys(_plain(switches, OPERATOR), "sglang")
        lines = []
        for key, names in lists.items():
            if self._from_environment(key):
                lines.append(f"{OPTIONS[key].env}={','.join(names)}" if names else "USE_FLAGGEMS=0")
            else:
                lines.append(f"{key}: [{', '.join(names)}]")
        if orders and self._from_environment("prefer", "op_backends"):
            orders = {op: "|".join(order) for op, order in self.settings.op_backends} | orders
            lines.append(f"SGLANG_FL_PER_OP='{';'.join(f'{op}={order}' for op, order in orders.items())}'")
        elif orders:
            lines += ["op_backends:", *(f"  {op}: [{order}]" for op, order in orders.items())]
        return "\n".join(lines)

    def _without(self, functions: Sequence[str]) -> dict[str, list[str]]:
        """The list of functions to set, by its key: the whitelist without these, or the blacklist with them."""
        if not functions:
            return {}
        if self.settings.flagos_whitelist is not None:
            return {"flagos_whitelist": [name for name in self.settings.flagos_whitelist if name not in functions]}
        return {"flagos_blacklist": [*(self.settings.flagos_blacklist or ()), *functions]}

    def _from_environment(self, *settings: str) -> bool:
        return any(self.settings.source(name).where == OPTIONS[name].env for name in settings)


def _plain(switches: Iterable[str], kind: str) -> list[str]:
    """The names of one kind, without their beginning."""
    return sorted(name.removeprefix(kind) for name in switches if name.startswith(kind))


def switches_in_force(settings: Settings, device: Device, manager: OpManager) -> Switches:
    """All that these settings put in SGLang's place here, as far as that is known before a model is loaded."""
    manager.use(settings, device)
    policy = SelectionPolicy.from_settings(settings)
    operators = [op for op in manager.registry.list_operators() if manager.plan(op, policy).candidates and _is_switch(op, settings, device)]
    return Switches((*(OPERATOR + op for op in operators), *(FUNCTION + name for name in used_functions(settings, device))), settings)


def _is_switch(op: str, settings: Settings, device: Device) -> bool:
    """Whether an operator's layers are taken over now, and could be left to SGLang: its kernels need Triton."""
    if is_kernel(op):
        return has_triton(device) and exclusion_reason(settings, op) is None
    return any(settings.exclusion_reason(names_in_lists(name, op)) is None for name in classes_of(op))


def known_bad_weights(names: Iterable[str]) -> Mapping[str, float]:
    """How suspicious each switch is: what profiles list as broken on their chips is more so."""
    listed: Counter[str] = Counter()
    for profile in sorted(PROFILES.glob("*.yaml")):
        entry = read_mapping(profile, what="a profile", problems=[]).get("flagos_broken")
        listed.update((entry.value or ()) if entry else ())
    return {name: 1.0 + _KNOWN_BAD * listed[name.removeprefix(FUNCTION)] * name.startswith(FUNCTION) for name in names}
