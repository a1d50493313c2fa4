# SPDX-License-Identifier: Apache-2.0
"""Every setting there is: its name, variable, YAML key, shape and meaning, in one table."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..device.declared import declared
from .errors import suggest

PREFERENCES = ("flagos", "vendor", "reference")
DIST_BACKENDS = ("nccl", "hccl", "mccl", "cncl", "eccl", "tccl", "xccl", "gloo", "flagcx")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Unusable(ValueError):
    """A value has the wrong shape. ``faults`` has (item, the part of a sentence after "X: ") pairs.

    An item is a list's index or a mapping's key; None is the value as a whole.
    """

    def __init__(self, *faults: str | tuple[Any, str]):
        self.faults = tuple((None, fault) if isinstance(fault, str) else fault for fault in faults)
        super().__init__("; ".join(told for _, told in self.faults))


def _flag(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _FLAGS:
        raise Unusable(f"{value!r} is neither on nor off{suggest(word, ('1', '0', 'true', 'false'))}")
    return _FLAGS[word]


def _choice(valid: tuple[str, ...], fold: Callable[[str], str]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        word = fold(str(value).strip())
        if word not in valid:
            raise Unusable(f"unknown value {value!r}{suggest(word, valid)}")
        return word

    return parse


def _collective(value: Any) -> str:
    word = str(value).strip().lower()
    if word in DIST_BACKENDS:
        return word
    return _choice((*DIST_BACKENDS, *(platform.collective for platform in declared().platforms.values())), str.lower)(word)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable(f"expected text, found {value!r}")
    return value.strip()


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, list):
        raise Unusable(f"expected a list of names, found {value!r}")
    faults = [(i, f"expected a name, found {item!r}") for i, item in enumerate(value) if not isinstance(item, str) or not item.strip()]
    if faults:
        raise Unusable(*faults)
    return tuple(dict.fromkeys(item.strip() for item in value))


def _order(op: str, value: Any) -> tuple[str, ...]:
    tokens = [t.strip() for t in value.split("|")] if isinstance(value, str) else value
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) and t for t in tokens):
        raise Unusable((op, f"{op}: expected an order such as 'vendor|flagos', found {value!r}"))
    return tuple(tokens)


def _orders(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(value, str):
        pairs: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in value.split(";"))):
            op, equals, order = part.partition("=")
            if not equals:
                raise Unusable(f"expected OP=ORDER;OP=ORDER, found {part!r}")
            if op.strip() in pairs:
                raise Unusable(f"{op.strip()!r} is given twice")
            pairs[op.strip()] = order
        value = pairs
    if not isinstance(value, dict):
        raise Unusable(f"expected a mapping from operator to order, found {value!r}")
    faults = []
    orders = []
    for op, order in value.items():
        if not isinstance(op, str) or not op:
            faults.append((op, f"expected an operator's name, found {op!r}"))
            continue
        try:
            orders.append((op, _order(op, order)))
        except Unusable as error:
            faults += error.faults
    if faults:
        raise Unusable(*faults)
    return tuple(orders)


@dataclass(frozen=True)
class Option:
    """One setting. ``env`` and ``yaml`` are its names there, None where it cannot be set so."""

    name: str
    env: str | None
    yaml: str | None
    default: Any
    parse: Callable[[Any], Any]
    doc: str
    names: str | None = None  # the Vocabulary field that its words come from


def _row(name: str, env: str | None, yaml: bool, default: Any, parse: Callable[[Any], Any], doc: str, names: str | None = None) -> Option:
    return Option(name, env, name if yaml else None, default, parse, doc, names)


# fmt: off
_LEVEL = _choice(LOG_LEVELS, str.upper)
_OPTIONS = (
    _row("oot_enabled", "SGLANG_FL_OOT_ENABLED", False, True, _flag, "0 switches Layer 2 off: every layer stays with SGLang."),
    _row("prefer", "SGLANG_FL_PREFER", True, "flagos", _choice(PREFERENCES, str.lower), "The kind of implementation to try first: flagos, vendor or reference."),
    _row("op_backends", "SGLANG_FL_PER_OP", True, (), _orders, "The order for single operators: rms_norm=vendor|flagos;silu_and_mul=reference."),
    _row("strict", "SGLANG_FL_STRICT", True, False, _flag, "1: an implementation that fails stops the server instead of giving way to the next."),
    _row("oot_whitelist", "SGLANG_FL_OOT_WHITELIST", True, None, _names, "Only these SGLang layer classes are taken over.", "classes"),
    _row("oot_blacklist", "SGLANG_FL_OOT_BLACKLIST", True, None, _names, "These SGLang layer classes stay with SGLang.", "classes"),
    _row("allow_vendors", "SGLANG_FL_ALLOW_VENDORS", True, None, _names, "Only these vendors' implementations may be used.", "vendors"),
    _row("deny_vendors", "SGLANG_FL_DENY_VENDORS", True, None, _names, "These vendors' implementations may not be used.", "vendors"),
    _row("dispatch_log", "SGLANG_FL_DISPATCH_LOG", False, None, _text, "A file: which operator ran on what."),
    _row("use_flaggems", "USE_FLAGGEMS", False, True, _flag, "0 switches Layer 1 off; FlagGems is never imported for it."),
    _row("flagos_whitelist", "SGLANG_FL_FLAGOS_WHITELIST", True, None, _names, "Only these FlagGems functions replace ATen operators.", "flaggems"),
    _row("flagos_blacklist", "SGLANG_FL_FLAGOS_BLACKLIST", True, None, _names, "These FlagGems functions do not replace ATen operators.", "flaggems"),
    _row("flaggems_record", "SGLANG_FLAGGEMS_RECORD", False, False, _flag, "1 logs the ATen operators that FlagGems replaced, as they run."),
    _row("flaggems_log_path", "SGLANG_FLAGGEMS_LOG_PATH", False, None, _text, "The file for that log."),
    _row("flaggems_log_once", "SGLANG_FLAGGEMS_LOG_ONCE", False, True, _flag, "1 logs each operator once."),
    _row("dist_backend", "SGLANG_FL_DIST_BACKEND", True, None, _collective, "The collective library; unset: the vendor's own."),
    _row("flagcx_path", "FLAGCX_PATH", False, None, _text, "FlagCX's checkout, or where its libflagcx.so is; set alone, it chooses flagcx."),
    _row("plugin_modules", "SGLANG_FL_PLUGIN_MODULES", False, None, _names, "More modules with register_builtins(registry)."),
    _row("log_level", "SGLANG_FL_LOG_LEVEL", False, "INFO", _LEVEL, "How much sglang-fl logs."),
    _row("dispatch_debug", "SGLANG_FL_DISPATCH_DEBUG", False, False, _flag, "1 logs every decision of the dispatch."),
)
# fmt: on

OPTIONS: dict[str, Option] = {option.name: option for option in _OPTIONS}

#: Variables that say where the settings come from, and the one that carries them to worker processes.
CONFIG_FILE, PROFILE, RESOLVED = "SGLANG_FL_CONFIG", "SGLANG_FL_PLATFORM", "_SGLANG_FL_RESOLVED_SETTINGS"
PREFIXES = ("SGLANG_FL_", "SGLANG_FLAGGEMS_")
VARIABLES = frozenset(option.env for option in _OPTIONS if option.env) | {CONFIG_FILE, PROFILE}


@dataclass(frozen=True)
class Vocabulary:
    """The names that settings may use. A field that is None is not checked.

    ``not_covered`` are operators and classes that exist, and that this version leaves to SGLang: they
    may stand in a blacklist, where that is what is asked. ``with_packages`` gives the operators, vendors and
    implementations of installed packages, and is asked once a word is not known without them: to find those packages is
    to import them.
    """

    operators: frozenset[str] | None = None
    classes: frozenset[str] | None = None
    vendors: frozenset[str] | None = None
    impls: frozenset[str] | None = None
    flaggems: frozenset[str] | None = None
    not_covered: frozenset[str] = frozenset()
    hints: Mapping[str, str] = field(default_factory=dict)
    with_packages: Callable[[], "Vocabulary"] | None = None

    def problem_with_token(self, token: str) -> str | None:
        """What is wrong with a token of an order, or None."""
        words = {"flagos", "vendor", "reference", "sglang"}
        head, colon, tail = token.partition(":")
        if token in ("vendor:", "impl:"):
            return f"a name is missing after the colon of {token!r}"
        if head == "vendor" and colon:
            return self._problem("vendor", tail, "vendors")
        if head == "impl" and colon:
            return self._problem("implementation", tail, "impls")
        if token in words:
            return None
        vendors, impls = (self._valid(kind, token) or () for kind in ("vendors", "impls"))
        valid = words | {f"vendor:{v}" for v in vendors} | {f"impl:{i}" for i in impls}
        return f"unknown backend {token!r}{suggest(token, valid if len(token) > 10 else words)}"

    def _valid(self, kind: str, word: str) -> frozenset[str] | None:
        """The words of a kind: those of installed packages too if ``word`` is not among the others."""
        valid: frozenset[str] | None = getattr(self, kind)
        if valid is None or word in valid or self.with_packages is None or kind not in ("operators", "vendors", "impls"):
            return valid
        return valid | getattr(self.with_packages(), kind)

    def _problem(self, what: str, word: str, kind: str) -> str | None:
        valid = self._valid(kind, word)
        if valid is None or word in valid:
            return None
        return f"unknown {what} {word!r}{suggest(word, valid)}"

    def problem_with(self, kind: str, word: str) -> str | None:
        """What is wrong with a word of one of the lists, or None."""
        label = {"classes": "SGLang layer class", "vendors": "vendor", "flaggems": "FlagGems function", "operators": "operator"}[kind]
        problem = self._problem(label, word, kind)
        if problem and word in self.not_covered:
            return f"{label} {word!r} is not covered by this version of sglang-fl; it stays with SGLang, so leave it out here"
        if problem and kind in self.hints:
            problem += f" ({self.hints[kind]})"
        return problem
