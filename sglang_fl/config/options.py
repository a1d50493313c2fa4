# SPDX-License-Identifier: Apache-2.0
"""All settings in one table: name, variable, YAML key, type and meaning."""

import errno
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..device import declared
from .errors import suggest
from .words import unreachable

PREFERENCES = ("flagos", "vendor", "reference")
DIST_BACKENDS = ("nccl", "hccl", "mccl", "cncl", "eccl", "tccl", "xccl", "gloo", "flagcx")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class InvalidValue(ValueError):
    """A value is not valid.

    Attributes:
        problems: (item, message) pairs; an item is a list's index or a mapping's key, None the value as a whole.
        usable: the value without those items; None: nothing of it is valid.
    """

    def __init__(self, *problems: str | tuple[Any, str], usable: Any = None):
        self.problems = tuple((None, problem) if isinstance(problem, str) else problem for problem in problems)
        self.usable = usable
        super().__init__("; ".join(message for _, message in self.problems))


def _boolean(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _BOOLEANS:
        raise InvalidValue(f"expected a boolean, found {value!r}{suggest(word, ('1', '0', 'true', 'false'))}")
    return _BOOLEANS[word]


def _choice(valid: tuple[str, ...], fold: Callable[[str], str]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        word = fold(str(value).strip())
        if word not in valid:
            raise InvalidValue(f"unknown value {value!r}{suggest(word, valid)}")
        return word

    return parse


def _collective(value: Any) -> str:
    word = str(value).strip().lower()
    if word in DIST_BACKENDS:
        return word
    return _choice((*DIST_BACKENDS, *(platform.row().collective for platform in declared().platforms.values())), str.lower)(word)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"expected text, found {value!r}")
    return value.strip()


def file_at(text: str) -> Path:
    """The file that a setting names. It need not exist.

    Raises:
        InvalidValue: no file can be there.
    """
    try:
        path = Path(text).expanduser()
        mode = path.stat().st_mode
    except RuntimeError:
        raise InvalidValue(f"expected a file, found {text!r}, a home directory of nobody") from None
    except ValueError as error:
        raise InvalidValue(f"expected a file, found {text!r} ({error})") from None
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            raise InvalidValue(f"expected a file, found {text!r}, in what is no directory") from None
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise InvalidValue(f"expected a file, found {text!r} ({error.strerror})") from None
        return path
    if stat.S_ISDIR(mode):
        raise InvalidValue(f"expected a file, found the directory {text!r}")
    if not stat.S_ISREG(mode):
        raise InvalidValue(f"expected a file, found {text!r}, which is no regular file")
    return path


def _file(value: Any) -> str:
    text = _text(value)
    if text:
        file_at(text)
    return text


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds < 1e6:
        raise InvalidValue(f"expected a number of seconds, found {value!r}")
    return seconds


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, list):
        raise InvalidValue(f"expected a list of names, found {value!r}")
    names = tuple(dict.fromkeys(item.strip() for item in value if isinstance(item, str) and item.strip()))
    problems = [(i, f"expected a name, found {item!r}") for i, item in enumerate(value) if not isinstance(item, str) or not item.strip()]
    if problems:
        raise InvalidValue(*problems, usable=names)
    return names


def _orders(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    problems: list[tuple[Any, str]] = []
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, str):
        for part in filter(None, (p.strip() for p in value.split(";"))):
            op, equals, order = part.partition("=")
            if equals:
                pairs.append((op.strip(), order))
            else:
                problems.append((None, f"expected OP=ORDER;OP=ORDER, found {part!r}"))
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        raise InvalidValue(f"expected a mapping from operator to order, found {value!r}")
    orders: dict[str, tuple[str, ...]] = {}
    for op, order in pairs:
        tokens = _tokens(order)
        if not isinstance(op, str) or not op:
            problems.append((op, f"expected an operator's name, found {op!r}"))
        elif op in orders:
            problems.append((op, f"duplicate operator {op!r}"))
        elif tokens is None:
            problems.append((op, f"{op}: expected an order such as 'vendor|flagos', found {order!r}"))
        else:
            orders[op] = tokens
            if message := unreachable(tokens):
                problems.append((op, f"{op}: {message}"))
    if problems:
        raise InvalidValue(*problems, usable=tuple(orders.items()))
    return tuple(orders.items())


def _tokens(order: Any) -> tuple[str, ...] | None:
    """The tokens of an order, such as ``"vendor|flagos"`` or a list of them; None: this is no order."""
    tokens = order.split("|") if isinstance(order, str) else order
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) and token.strip() for token in tokens):
        return None
    return tuple(token.strip() for token in tokens)


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        env: its variable, or None.
        in_file: whether a user's file may have it.
        names: the field of :class:`Words` with its valid names.
        users_key: for a key that only profiles have: the key that users have instead.
    """

    name: str
    env: str | None
    in_file: bool
    default: Any
    parse: Callable[[Any], Any]
    doc: str
    names: str | None = None
    users_key: str | None = None

    @property
    def yaml(self) -> str | None:
        """Its key in a user's file, or None."""
        return self.name if self.in_file else None


def _option(env: str | None, in_file: bool, default: Any, *more: Any) -> Any:
    """A setting's field; its :class:`Option` takes the same arguments in the same order."""
    return field(default=default, metadata={"option": (env, in_file, default, *more)})


# fmt: off
@dataclass(frozen=True)
class Options:
    """The table: one line per setting, as an :class:`Option` without its name."""

    oot_enabled: bool = _option("SGLANG_FL_OOT_ENABLED", False, True, _boolean, "0 switches Layer 2 off: every layer stays with SGLang.")
    prefer: str = _option("SGLANG_FL_PREFER", True, "flagos", _choice(PREFERENCES, str.lower), "The kind of implementation to try first: flagos, vendor or reference.")
    op_backends: tuple[tuple[str, tuple[str, ...]], ...] = _option("SGLANG_FL_PER_OP", True, (), _orders, "The order for single operators: rms_norm=vendor|flagos;silu_and_mul=reference.")
    strict: bool = _option("SGLANG_FL_STRICT", True, False, _boolean, "1: an implementation that fails stops the server instead of giving way to the next.")
    oot_whitelist: tuple[str, ...] | None = _option("SGLANG_FL_OOT_WHITELIST", True, None, _names, "Only these SGLang layer classes are bound.", "classes")
    oot_blacklist: tuple[str, ...] | None = _option("SGLANG_FL_OOT_BLACKLIST", True, None, _names, "These SGLang layer classes stay with SGLang.", "classes")
    allow_vendors: tuple[str, ...] | None = _option("SGLANG_FL_ALLOW_VENDORS", True, None, _names, "Only these vendors' implementations may be used.", "vendors")
    deny_vendors: tuple[str, ...] | None = _option("SGLANG_FL_DENY_VENDORS", True, None, _names, "These vendors' implementations may not be used.", "vendors")
    dispatch_log: str | None = _option("SGLANG_FL_DISPATCH_LOG", False, None, _text, "A file: which operator ran on what.")
    use_flaggems: bool = _option("USE_FLAGGEMS", False, True, _boolean, "0 switches Layer 1 off: FlagGems replaces no ATen operator. Orders keep their flagos implementations.")
    flagos_whitelist: tuple[str, ...] | None = _option("SGLANG_FL_FLAGOS_WHITELIST", True, None, _names, "Only these FlagGems functions replace ATen operators.", "flaggems")
    flagos_blacklist: tuple[str, ...] | None = _option("SGLANG_FL_FLAGOS_BLACKLIST", True, None, _names, "These FlagGems functions do not replace ATen operators.", "flaggems")
    flagos_faster: tuple[str, ...] | None = _option(None, False, None, _names, "The FlagGems functions measured as not slower: those in use by default.", "flaggems", "flagos_whitelist")
    flagos_broken: tuple[str, ...] | None = _option(None, False, None, _names, "The FlagGems functions measured or reported as wrong.", "flaggems", "flagos_blacklist")
    flagos_slower: tuple[str, ...] | None = _option(None, False, None, _names, "The FlagGems functions that make a served model's step slower, by GPU time.", "flaggems", "flagos_blacklist")
    triton_faster: tuple[str, ...] | None = _option(None, False, None, _names, "The operators whose Triton kernel of this package goes before FlagGems's where flagos or vendor is preferred.", "operators", "op_backends")
    flagos_scope: str = _option("SGLANG_FL_FLAGOS_SCOPE", True, "everywhere", _choice(("graphs", "everywhere"), str.lower), "Where FlagGems functions replace ATen operators: graphs (only while SGLang captures graphs) or everywhere.")
    trial_record: str | None = _option("SGLANG_FL_TRIAL_RECORD", True, None, _file, "The file that remembers what ended a start; unset: in the user's state folder.")
    trial_limit: float = _option("SGLANG_FL_TRIAL_LIMIT", True, 600.0, _seconds, "How long a first run may take, in seconds, before the process is ended; 0: no limit.")
    flaggems_record: bool = _option("SGLANG_FLAGGEMS_RECORD", False, False, _boolean, "1 logs the ATen operators that FlagGems replaced, as they run.")
    flaggems_log_path: str | None = _option("SGLANG_FLAGGEMS_LOG_PATH", False, None, _text, "The file for that log.")
    flaggems_log_once: bool = _option("SGLANG_FLAGGEMS_LOG_ONCE", False, True, _boolean, "1 logs each operator once.")
    dist_backend: str | None = _option("SGLANG_FL_DIST_BACKEND", True, None, _collective, "The collective library; unset: the vendor's own.")
    flagcx_path: str | None = _option("FLAGCX_PATH", False, None, _text, "FlagCX's checkout, or where its libflagcx.so is; set alone, it chooses flagcx.")
    plugin_modules: tuple[str, ...] | None = _option("SGLANG_FL_PLUGIN_MODULES", False, None, _names, "More modules with register_builtins(registry).")
    patches: bool = _option("SGLANG_FL_PATCHES", False, True, _boolean, "0 starts without the changes to SGLang that packages and vendors' folders make.")
    log_level: str = _option("SGLANG_FL_LOG_LEVEL", False, "INFO", _choice(LOG_LEVELS, str.upper), "How much sglang-fl logs.")
    dispatch_debug: bool = _option("SGLANG_FL_DISPATCH_DEBUG", False, False, _boolean, "1 logs every decision of the dispatch.")
# fmt: on


OPTIONS: dict[str, Option] = {row.name: Option(row.name, *row.metadata["option"]) for row in fields(Options)}

#: Variables that say where the settings come from.
CONFIG_FILE, PLATFORM = "SGLANG_FL_CONFIG", "SGLANG_FL_PLATFORM"
PREFIXES = ("SGLANG_FL_", "SGLANG_FLAGGEMS_")
VARIABLES = frozenset(option.env for option in OPTIONS.values() if option.env) | {CONFIG_FILE, PLATFORM}
