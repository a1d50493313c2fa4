# SPDX-License-Identifier: Apache-2.0
"""Settings: the checked values, and the source of each."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .options import OPTIONS, Options

#: What a value can come from, lowest precedence first.
DEFAULT, PROFILE, FILE, ENVIRONMENT = range(4)
#: The settings that exclude FlagGems functions. Only profiles have the second and the third.
FLAGOS_EXCLUDING = ("flagos_blacklist", "flagos_broken", "flagos_slower")


@dataclass(frozen=True)
class Source:
    """The source of a value: its precedence, and its name, such as a file and line."""

    precedence: int
    where: str

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Settings(Options):
    """The settings in force. Build one with :func:`sglang_fl.config.load_settings`.

    The attributes are the rows of :class:`sglang_fl.config.options.Options`; ``sources`` has a
    :class:`Source` for each of them, ``order_sources`` one for each operator in ``op_backends``, and ``platform`` is
    the name of the profile in use.
    """

    platform: str = "cpu"
    profile_file: str | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    order_sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def collective(self) -> str | None:
        """The collective library that was asked for, or None: FLAGCX_PATH alone asks for FlagCX."""
        if self.dist_backend is None and self.flagcx_path is not None:
            return "flagcx"
        return self.dist_backend

    @property
    def flagos_key(self) -> str:
        """The setting that selects the FlagGems functions which replace ATen operators; ``prefer`` selects all of them."""
        if self.flagos_whitelist is not None:
            return "flagos_whitelist"
        user_prefers_flagos = self.prefer == "flagos" and self.source("prefer").precedence > PROFILE
        return "prefer" if self.flagos_faster is None or user_prefers_flagos else "flagos_faster"

    @property
    def flagos_functions(self) -> tuple[str, ...] | None:
        """The FlagGems functions that replace ATen operators; None: all but those with a :meth:`flagos_exclusion_reason`."""
        if self.flagos_key == "prefer":
            return None
        return tuple(function for function in getattr(self, self.flagos_key) if self.flagos_exclusion_reason(function) is None)

    def flagos_exclusion_reason(self, function: str) -> str | None:
        """Why a FlagGems function does not replace ATen operators: a setting and its source. None: it does.

        A whitelist is used as it is, with functions that are known to be broken or slower too. A name that excludes stands for the
        variants that write in place or to ``out`` as well: ``mul`` for ``mul_``, and ``mm`` for ``mm_out``. They are the same kernel.
        """
        selecting = self.flagos_key
        names = {function, function.removesuffix("_out"), function.removesuffix("_")}
        for key in () if selecting == "flagos_whitelist" else FLAGOS_EXCLUDING:
            if found := names.intersection(getattr(self, key) or ()):
                of = "" if function in found else f": {found.pop()}"
                return f"{key}{of} ({self.source(key)})"
        if selecting != "prefer" and function not in getattr(self, selecting):
            return f"not in {selecting} ({self.source(selecting)})"
        return None

    def exclusion_of(self, name: str) -> str:
        """The setting that excludes a trial's name: a FlagGems function, or ``operator: implementation``."""
        op, colon, _ = name.partition(": ")
        if colon:
            orders = {known: "|".join(order) for known, order in self.op_backends} | {op: "sglang"}
            return f"SGLANG_FL_PER_OP='{';'.join(f'{known}={order}' for known, order in orders.items())}'"
        if self.flagos_whitelist is not None:
            others = ",".join(other for other in self.flagos_whitelist if other != name)
            return f"SGLANG_FL_FLAGOS_WHITELIST={others}" if others else "USE_FLAGGEMS=0"  # an empty variable is as one not set
        return f"SGLANG_FL_FLAGOS_BLACKLIST={','.join((*(self.flagos_blacklist or ()), name))}"

    def exclusion_reason(self, class_names: set[str]) -> str | None:
        """Why a layer stays with SGLang whatever the policy says, or None.

        Args:
            class_names: the layer's class and those it is derived from; any of them may stand in a list.
        """
        if not self.oot_enabled:
            return "Layer 2 is off"
        if self.oot_blacklist is not None and class_names & set(self.oot_blacklist):
            return "oot_blacklist"
        if self.oot_whitelist is not None and not class_names & set(self.oot_whitelist):
            return "not in oot_whitelist"
        return None

    def source(self, name: str) -> Source:
        return self.sources.get(name, Source(DEFAULT, "default"))

    def source_of_order(self, op: str) -> Source:
        """Where the order that an operator goes by came from: its own, or the preference."""
        if op not in dict(self.op_backends):
            return self.source("prefer")
        return self.order_sources.get(op, self.source("op_backends"))

    def items(self) -> Iterator[tuple[str, Any, Source]]:
        """(name, value, source) of every setting, in the table's order."""
        for name in OPTIONS:
            yield name, getattr(self, name), self.source(name)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        data = json.loads(text)
        for name in OPTIONS:
            if isinstance(data[name], list):
                data[name] = tuple(data[name])
        data["op_backends"] = tuple((op, tuple(order)) for op, order in data["op_backends"])
        for places in ("sources", "order_sources"):
            data[places] = {name: Source(**source) for name, source in data[places].items()}
        return cls(**{f.name: data[f.name] for f in fields(cls)})
