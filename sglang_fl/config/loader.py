# SPDX-License-Identifier: Apache-2.0
"""Reads the settings: defaults < platform profile < the user's YAML files < environment."""

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..device import ALIASES, Device, canonical, declared, known_vendors, probe
from .errors import SettingsError, suggest
from .ignored import IGNORED_VARIABLES
from .options import CONFIG_FILE, OPTIONS, PLATFORM, PREFIXES, VARIABLES, InvalidValue, Option
from .settings import DEFAULT, ENVIRONMENT, FILE, PROFILE, Settings, Source
from .words import Words
from .yaml_file import read_mapping

logger = logging.getLogger("sglang_fl")

#: The key of a profile under which ``sglang-fl tune`` says what it measured, and with what. It sets nothing.
MEASURED = "measured"
PROFILES = Path(__file__).parent
_LISTS = (("oot_whitelist", "oot_blacklist"), ("flagos_whitelist", "flagos_blacklist"))


def load_settings(environ: Mapping[str, str] | None = None, *, device: Device | None = None, words: Words | None = None) -> Settings:
    """Read the settings from the environment, the user's YAML files and the platform's profile.

    Args:
        environ: the environment; the process's own if None.
        device: what was detected; asked of the drivers if None.
        words: the names that may be used; None checks values and keys, but not names.

    Raises:
        SettingsError: with every problem that was found, each with its file and line or variable.
    """
    environ = os.environ if environ is None else environ
    words = words or Words()
    device = device or probe(environ)
    problems: list[str] = []
    try:
        platform, in_tree = platform_name(environ, device)
    except SettingsError as error:
        platform, in_tree = device.vendor, device.is_in_tree
        problems += error.problems
    problems += _unknown_variables(environ)
    profile = profile_path(platform, in_tree)
    layers = (
        *_read_profiles(platform, in_tree, words, problems),
        *(_read_users_file(name, words, problems) for name in config_files(environ)),
        _read_environment(environ, words, problems),
    )
    chosen = _merge(layers)
    is_default = "flagos_scope" not in chosen or chosen["flagos_scope"].source.precedence == DEFAULT
    if is_default and not in_tree and "graph_capture" in known_vendors()[platform].capabilities:
        chosen["flagos_scope"] = _Given("graphs", Source(DEFAULT, f"default where graphs are captured, as on {platform}"), "flagos_scope")
    problems += _contradictions(chosen)
    if problems:
        raise SettingsError(problems)
    return Settings(
        **{name: given.value for name, given in chosen.items()},
        platform=platform,
        profile_file=str(profile) if profile else None,
        sources={name: given.source for name, given in chosen.items()},
        order_sources=chosen["op_backends"].item_sources if "op_backends" in chosen else {},
    )


def plugin_modules(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The modules that SGLANG_FL_PLUGIN_MODULES names, whatever else is wrong with the settings."""
    option = OPTIONS["plugin_modules"]
    return option.parse(environ.get(option.env or "", ""))


def config_files(environ: Mapping[str, str]) -> list[str]:
    """The files that SGLANG_FL_CONFIG names, lowest precedence first."""
    return [name for part in environ.get(CONFIG_FILE, "").split(",") if (name := part.strip())]


def profile_path(name: str, in_tree: bool = False) -> Path | None:
    """The profile's file, or None where a platform has none.

    A package that brings up a chip, or adds to one, may bring its profile too, which is read over the shipped one.
    """
    brought = declared().platforms.get(name)
    if brought is not None and brought.profile is not None:
        return Path(brought.profile)
    return _shipped_profile(name, in_tree)


def _shipped_profile(name: str, in_tree: bool) -> Path | None:
    """A platform that SGLang knows and nobody has measured falls to ``in_tree.yaml``, which leaves every operator to SGLang."""
    path = PROFILES / f"{name}.yaml"
    if in_tree and (name == "cpu" or not path.exists()):
        return PROFILES / "in_tree.yaml"
    return path if path.exists() else None


def platform_name(environ: Mapping[str, str], device: Device) -> tuple[str, bool]:
    """The profile's name and whether the platform is one of SGLang's own."""
    asked = environ.get(PLATFORM, "").strip()
    if not asked:
        return device.vendor, device.is_in_tree
    name = canonical(asked)
    vendors = known_vendors()
    if name not in vendors:
        raise SettingsError(f"{PLATFORM}: unknown platform {asked!r}{suggest(asked, vendors.keys() | ALIASES.keys())}")
    return name, vendors[name].in_tree is not None


@dataclass(frozen=True)
class _Given:
    """A value of one source. Messages about it begin with ``where``, or ``item_where`` for single items."""

    value: Any
    source: Source
    where: str
    item_where: Mapping[Any, str] = field(default_factory=dict)
    item_sources: Mapping[str, Source] = field(default_factory=dict)  # of a table merged from several sources

    def where_is(self, item: Any) -> str:
        return self.item_where.get(item, self.where)


#: Preference -> the order where this package's own kernel is faster than FlagGems's.
_TRITON_FIRST = {"flagos": ("triton", "flagos", "vendor", "reference"), "vendor": ("vendor", "triton", "flagos", "reference")}
#: The values of one source, by the setting's name.
_Layer = dict[str, _Given]


def _merge(layers: Sequence[_Layer]) -> _Layer:
    """Higher sources override lower ones; orders are merged operator by operator."""
    chosen: _Layer = {}
    for layer in layers:
        chosen |= layer
    for white, black in _LISTS:
        if _are_given(chosen, white, black) and chosen[white].source.precedence > chosen[black].source.precedence:
            chosen[black] = replace(chosen[black], value=None, source=chosen[white].source)
    if "op_backends" in chosen:
        chosen["op_backends"] = _merge_orders(layers, chosen["op_backends"].where)
    order = _TRITON_FIRST.get(chosen["prefer"].value if "prefer" in chosen else "flagos")
    if _are_given(chosen, "triton_faster") and order is not None:
        chosen["op_backends"] = _with_triton_first(order, chosen["triton_faster"], chosen.get("op_backends"))
    return chosen


def _merge_orders(layers: Sequence[_Layer], where: str) -> _Given:
    """The orders of all sources. ``prefer`` is about every operator, so it overrides the orders of lower sources."""
    orders: dict[str, tuple[str, ...]] = {}
    sources: dict[str, Source] = {}
    source = Source(DEFAULT, "default")
    for layer in layers:
        prefer, table = layer.get("prefer"), layer.get("op_backends")
        if prefer is not None and prefer.source.precedence != DEFAULT and orders:
            source = Source(DEFAULT, f"default; prefer from {prefer.source} overrides the orders of {_joined(sources.values())}")
            orders, sources = {}, {}
        if table is not None and table.source.precedence == DEFAULT:
            orders, sources, source = {}, {}, table.source
        elif table is not None:
            orders |= dict(table.value)
            sources |= {op: table.source for op, _ in table.value}
    return _Given(tuple(orders.items()), _joined(sources.values()) if sources else source, where, item_sources=sources)


def _with_triton_first(order: tuple[str, ...], faster: _Given, orders: _Given | None) -> _Given:
    """The orders, and one for each operator without that a profile says this package's own kernels are faster for than FlagGems's."""
    given = orders or _Given((), faster.source, faster.where)
    added = {op: order for op in faster.value if op not in dict(given.value)}
    sources = {**given.item_sources, **dict.fromkeys(added, faster.source)}
    return replace(given, value=(*given.value, *added.items()), source=_joined([given.source, *sources.values()]), item_sources=sources)


def _joined(sources: Iterable[Source]) -> Source:
    ordered = sorted(set(sources), key=lambda source: -source.precedence)
    return Source(ordered[0].precedence, " and ".join(source.where for source in ordered))


def _are_given(chosen: _Layer, *names: str) -> bool:
    return all(name in chosen and chosen[name].value is not None for name in names)


def _contradictions(chosen: _Layer) -> Iterator[str]:
    for white, black in _LISTS:
        if _are_given(chosen, white, black):
            first, second = chosen[white], chosen[black]
            hint = f" (set {white}: null in a file to drop the lower one)" if first.source.precedence < second.source.precedence else ""
            yield f"{first.where} and {second.where}: give one or the other, not both{hint}"
    if not _are_given(chosen, "allow_vendors", "deny_vendors"):
        return
    allow, deny = chosen["allow_vendors"], chosen["deny_vendors"]
    denied = {canonical(vendor): vendor for vendor in deny.value}
    both = [vendor for vendor in allow.value if canonical(vendor) in denied]
    if both and (len(both) == len(allow.value) or allow.source.precedence == deny.source.precedence):
        pairs = ", ".join(f"{vendor!r} is allowed and {denied[canonical(vendor)]!r}, the same vendor, is denied" for vendor in both)
        yield f"{allow.where} and {deny.where}: {pairs}" + ("; no vendor is left" if len(both) == len(allow.value) else "")


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    shapes = {option.name: option.env for option in OPTIONS.values() if option.env} | {_stem(name).lower(): name for name in VARIABLES}
    brought = sorted({variable for platform in declared().platforms.values() for variable in platform.variables})
    # One that is nearly a variable of ours would make a misspelling of it valid.
    packages = [variable for variable in brought if not difflib.get_close_matches(variable, VARIABLES, cutoff=0.9)]
    for variable in environ:
        if variable in VARIABLES or variable in IGNORED_VARIABLES or variable in packages:
            continue
        upper = variable.upper()
        if near := difflib.get_close_matches(upper, packages, n=1, cutoff=0.9):
            yield f"{variable}: no package has such a variable; did you mean {near[0]!r}?"
            continue
        if upper.startswith(PREFIXES) or difflib.get_close_matches(upper, _WITHOUT_PREFIX, cutoff=0.9):
            near = difflib.get_close_matches(_stem(upper).lower(), shapes, n=1, cutoff=0.7)
            hint = f"did you mean {shapes[near[0]]!r}?" if near else "sglang-fl config lists the settings"
            yield f"{variable}: there is no such setting; {hint}"
    # FlagGems itself ignores an unknown vendor silently.
    forced = environ.get("GEMS_VENDOR", "").strip()
    if forced and canonical(forced) not in known_vendors():
        yield f"GEMS_VENDOR: unknown vendor {forced!r}{suggest(forced, known_vendors().keys())}"


#: Variables that do not begin as the others do. FlagOS's other programs have more that begin with USE_FLAG.
_WITHOUT_PREFIX = sorted(variable for variable in VARIABLES if not variable.startswith(PREFIXES))


def _stem(variable: str) -> str:
    for prefix in PREFIXES:
        variable = variable.removeprefix(prefix)
    return variable


def _read_profiles(name: str, in_tree: bool, words: Words, problems: list[str]) -> list[_Layer]:
    """The shipped profile of a platform, and over it that of its package, whose ``flagos_broken`` adds to the shipped one."""
    paths = (_shipped_profile(name, in_tree), profile_path(name, in_tree))
    layers = [_read_profile(path, words, problems) for path in dict.fromkeys(paths) if path is not None]
    if len(layers) == 2:
        shipped, brought = layers
        if _are_given(shipped, "flagos_broken") and _are_given(brought, "flagos_broken"):
            low, high = shipped["flagos_broken"], brought["flagos_broken"]
            value = tuple(dict.fromkeys((*low.value, *high.value)))
            where = {**low.item_where, **high.item_where}
            brought["flagos_broken"] = replace(high, value=value, source=_joined((low.source, high.source)), item_where=where)
        for pair in _LISTS:
            for mine, other in (pair, pair[::-1]):
                if _are_given(brought, mine):  # the package's own choice, in either form, takes the place of the shipped one
                    shipped.pop(other, None)
    return layers


def _read_profile(path: Path, words: Words, problems: list[str]) -> _Layer:
    if path.parent != PROFILES:
        return _read_file(path, PROFILE, str(path), words, problems)
    # Ours name functions of several FlagGems releases.
    return _read_file(path, PROFILE, f"profile {path.stem}", replace(words, flaggems=None), problems)


def _read_users_file(name: str, words: Words, problems: list[str]) -> _Layer:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        problems.append(f"{CONFIG_FILE}: {name!r}: {error}")
        return {}
    return _read_file(path, FILE, name, words, problems)


def _read_file(path: Path, precedence: int, name: str, words: Words, problems: list[str]) -> _Layer:
    layer: _Layer = {}
    gone: list[str] = []
    try:
        entries = read_mapping(path, what=CONFIG_FILE if precedence == FILE else "the platform's profile", problems=problems)
    except SettingsError as error:
        problems += error.problems
        return layer
    measured = entries.pop(MEASURED, None)
    if measured is not None and not isinstance(measured.value, dict):
        problems.append(f"{path}:{measured.line}: {MEASURED}: expected a mapping, as sglang-fl tune writes it, found {measured.value!r}")
    elif measured is not None:
        wrong = [key for key in ("with", "entries") if not isinstance(measured.value.get(key, {}), dict)]
        problems += [
            f"{path}:{measured.item_lines[key]}: {MEASURED}: {key}: expected a mapping, as sglang-fl tune writes it" for key in wrong
        ]
    # What was measured makes a file a profile, wherever it lies.
    is_profile = precedence == PROFILE or measured is not None
    keys = {option.name: option for option in OPTIONS.values() if option.in_file or (is_profile and option.users_key)}
    for key, entry in entries.items():
        where = f"{path}:{entry.line}"
        option = keys.get(key)
        if option is None:
            problems.append(f"{where}: {_why_no_key(key, keys)}")
        elif entry.value is None:  # the default again: no source has set it
            layer[option.name] = _Given(option.default, Source(DEFAULT, f"{name}:{entry.line}"), f"{where}: {key}")
        else:
            items = {item: f"{path}:{line}: {key}" for item, line in entry.item_lines.items()}
            given = _Given(entry.value, Source(precedence, f"{name}:{entry.line}"), f"{where}: {key}", items)
            _parse(option, given, layer, words, problems, None if measured is None else gone)
    if gone:
        _warn_of_gone(path, tuple(gone))
    return layer


@cache
def _warn_of_gone(path: Path, gone: tuple[str, ...]) -> None:
    """Say once what a profile names that is not here any more. The rest of it holds."""
    lines = "".join(f"\n  {each}" for each in gone)
    logger.warning("sglang-fl: these are left to SGLang; measure again with sglang-fl tune --update %s MODEL:%s", path, lines)


def _why_no_key(key: Any, keys: Mapping[str, Option]) -> str:
    other = next((option for option in OPTIONS.values() if key in (option.name, option.env)), None)
    if other is None:
        shapes = {_stem(option.env or ""): name for name, option in keys.items()} | {name: name for name in keys}
        return f"unknown key {key!r}{suggest(_stem(str(key)), shapes)}"
    if other.users_key:
        return f"{key!r} is a key of profiles, which say what was measured; in your own file use {other.users_key!r}"
    return f"unknown key {key!r}; " + (f"in a file it is {other.yaml!r}" if other.yaml else f"it is set with the variable {other.env}")


def _read_environment(environ: Mapping[str, str], words: Words, problems: list[str]) -> _Layer:
    layer: _Layer = {}
    for option in OPTIONS.values():
        if option.env is not None and environ.get(option.env, "").strip():
            _parse(option, _Given(environ[option.env], Source(ENVIRONMENT, option.env), option.env), layer, words, problems)
    return layer


def _parse(option: Option, given: _Given, layer: _Layer, words: Words, problems: list[str], gone: list[str] | None = None) -> None:
    """Parse and check a value, and add it to the layer. A problem with one item does not hide others.

    Args:
        gone: takes the unknown names of a profile that was measured, which are left out. None: they are problems.
    """
    try:
        value = option.parse(given.value)
    except InvalidValue as error:
        problems += [f"{given.where_is(item)}: {message}" for item, message in error.problems]
        value = error.usable
    if value is not None:
        unknown = list(_unknown_names(option, value, words))
        told = problems if gone is None else gone
        told += [f"{given.where_is(item)}: {message}" for item, message in unknown]
        if unknown and gone is not None:
            value = _without(option, value, {item for item, _ in unknown}, words)
        if option.name == "op_backends":  # some may be given under the name of SGLang's class
            value = tuple((words.operator_of.get(name, name), order) for name, order in value)
        layer[option.name] = replace(given, value=value)


def _without(option: Option, value: Any, unknown: set[str], words: Words) -> Any:
    """A value without unknown names. An operator whose order has one is left to SGLang."""
    if option.name != "op_backends":
        return tuple(word for word in value if word not in unknown)
    known = [(op, order) for op, order in value if words.problem_with_operator(words.operator_of.get(op, op), order) is None]
    return tuple((op, ("sglang",) if op in unknown else order) for op, order in known)


def _unknown_names(option: Option, value: Any, words: Words) -> Iterator[tuple[str, str]]:
    """(item, message) of each unknown name."""
    if option.name == "op_backends":
        given = {op for op, _ in value}
        for op, order in value:
            meant = words.operator_of.get(op, op)
            if meant != op and meant in given:
                yield op, f"{op!r} and {meant!r} mean the same operator; give one of them"
            elif problem := words.problem_with_operator(meant, order):
                yield op, problem
            yield from ((op, f"{op}: {problem}") for problem in map(words.problem_with_token, order) if problem)
    elif option.names:
        for word in value:
            problem = words.problem_with(option.names, word)
            if problem and not (option.name == "oot_blacklist" and word in words.not_covered):
                yield word, problem
