# SPDX-License-Identifier: Apache-2.0
"""Reads the settings: defaults < platform profile < the user's YAML < environment."""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..device import Device, probe
from ..device.declared import declared, known_vendors
from ..device.vendors import ALIASES, canonical
from .errors import SettingsError, suggest
from .options import CONFIG_FILE, OPTIONS, PREFIXES, PROFILE, RESOLVED, VARIABLES, Option, Unusable, Vocabulary
from .settings import DEFAULT, ENVIRONMENT, FILE, Settings, Source
from .settings import PROFILE as PROFILE_PLACE
from .yaml_file import Entry, read_mapping

PROFILES = Path(__file__).parent
_PAIRS = (("oot_whitelist", "oot_blacklist"), ("flagos_whitelist", "flagos_blacklist"))


@dataclass
class _Value:
    """A value on its way into the Settings, with the names to blame it by."""

    value: Any
    source: Source
    label: str
    item_labels: dict[Any, str] = field(default_factory=dict)
    is_reset: bool = False  # null in a file
    weaker: "_Value | None" = None  # the table of a weaker place, which this one adds to

    def blame(self, item: Any) -> str:
        return self.item_labels.get(item, self.label)


def _choose(option: Option, value: _Value, chosen: dict[str, _Value]) -> None:
    """A value from a stronger place. It takes the weaker one's place, but for a table, which is joined item by item."""
    if option.name == "op_backends" and not value.is_reset:
        value.weaker = chosen.get(option.name)
    chosen[option.name] = value


def profile_path(name: str, *, in_tree: bool = False) -> Path | None:
    """The profile's file, or None where a platform has none.

    A package that brings up a chip may bring its profile too. A platform that SGLang knows and nobody has
    measured falls to ``in_tree.yaml``, which leaves every operator to SGLang.
    """
    brought = declared().platforms.get(name)
    if brought is not None and brought.profile is not None:
        return Path(brought.profile)
    path = PROFILES / f"{name}.yaml"
    if in_tree and (name == "cpu" or not path.exists()):
        return PROFILES / "in_tree.yaml"
    return path if path.exists() else None


def platform_name(environ: Mapping[str, str], device: Device) -> tuple[str, bool]:
    """The profile's name and whether the platform is one of SGLang's own."""
    asked = environ.get(PROFILE, "").strip()
    if not asked:
        return device.vendor, device.is_in_tree
    name = canonical(asked)
    vendors = known_vendors()
    if name not in vendors:
        raise SettingsError(f"{PROFILE}: unknown platform {asked!r}{suggest(asked, vendors.keys() | ALIASES.keys())}")
    return name, vendors[name].in_tree is not None


def load_settings(
    environ: Mapping[str, str] | None = None,
    *,
    device: Device | None = None,
    vocabulary: Vocabulary | None = None,
) -> Settings:
    """Read the settings from the environment, the user's YAML and the platform's profile.

    Args:
        environ: the environment; the process's own if None.
        device: what was detected; asked of the drivers if None.
        vocabulary: the names that may be used; None checks values and keys, but not names.

    Raises:
        SettingsError: with every problem that was found, each with its file and line or variable.
    """
    environ = os.environ if environ is None else environ
    vocabulary = vocabulary or Vocabulary()
    device = device or probe(environ)
    problems: list[str] = []
    try:
        platform, in_tree = platform_name(environ, device)
    except SettingsError as error:
        platform, in_tree = device.vendor, device.is_in_tree
        problems += error.problems
    problems += _unknown_variables(environ)
    chosen: dict[str, _Value] = {}

    profile = profile_path(platform, in_tree=in_tree)
    if profile is not None:
        label = f"profile {profile.stem}" if profile.parent == PROFILES else str(profile)
        _read_file(profile, PROFILE_PLACE, label, chosen, problems, vocabulary)
    in_profile = dict(chosen)
    user_file = environ.get(CONFIG_FILE, "").strip()
    if user_file:
        try:
            path = Path(user_file).expanduser()
        except RuntimeError as error:  # ~name of nobody
            problems.append(f"{CONFIG_FILE}: {user_file!r}: {error}")
        else:
            _read_file(path, FILE, user_file, chosen, problems, vocabulary)
    in_profile = {name: value for name, value in in_profile.items() if not chosen[name].is_reset}
    _read_environment(environ, chosen, problems, vocabulary)

    problems += _clashing_lists(chosen)
    if problems:
        raise SettingsError(problems)
    order_sources = _join_orders(chosen)
    _give_way_to_prefer(chosen)
    _settle_lists(chosen, in_profile)
    return Settings(
        **{name: value.value for name, value in chosen.items()},
        platform=platform,
        profile_file=str(profile) if profile else None,
        sources={name: value.source for name, value in chosen.items()},
        order_sources=order_sources,
    )


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    shapes = {option.name: option.env for option in OPTIONS.values() if option.env} | {_stem(name): name for name in VARIABLES}
    for variable in environ:
        if variable in VARIABLES:
            continue
        shouted = variable.upper()
        if shouted.startswith(PREFIXES) or difflib.get_close_matches(shouted, _WITHOUT_PREFIX, cutoff=0.9):
            yield f"{variable}: there is no such setting{suggest(_stem(variable), shapes)}"
    # FlagGems itself takes a vendor that it does not know for none, without a word.
    forced = environ.get("GEMS_VENDOR", "").strip()
    if forced and canonical(forced) not in known_vendors():
        yield f"GEMS_VENDOR: unknown vendor {forced!r}{suggest(forced, known_vendors().keys())}"


#: Variables that do not begin as the others do. FlagOS's other programs have more that begin with USE_FLAG.
_WITHOUT_PREFIX = sorted(variable for variable in VARIABLES if not variable.startswith(PREFIXES))


def _stem(variable: str) -> str:
    for prefix in PREFIXES:
        variable = variable.removeprefix(prefix)
    return variable


def _read_file(path: Path, place: int, name: str, chosen: dict[str, _Value], problems: list[str], vocabulary: Vocabulary) -> None:
    by_key = {option.yaml: option for option in OPTIONS.values() if option.yaml}
    try:
        entries = read_mapping(path, what=CONFIG_FILE if place == FILE else "the platform's profile", problems=problems)
    except SettingsError as error:
        problems += error.problems
        return
    for key, entry in entries.items():
        where = f"{path}:{entry.line}"
        option = by_key.get(key)
        if option is None:
            other = next((option for option in OPTIONS.values() if key in (option.name, option.env)), None)
            if other is None:
                shapes = {_stem(o.env or ""): k for k, o in by_key.items()} | {k: k for k in by_key}
                hint = suggest(_stem(str(key)), shapes)
            elif other.yaml:
                hint = f"; in a file it is {other.yaml!r}"
            else:
                hint = f"; it is set with the variable {other.env}"
            problems.append(f"{where}: unknown key {key!r}{hint}")
        elif entry.value is None:
            _choose(option, _Value(option.default, Source(place, f"{name}:{entry.line}"), f"{where}: {key}", is_reset=True), chosen)
        else:
            _parse(option, entry, Source(place, f"{name}:{entry.line}"), path, chosen, problems, vocabulary)


def _parse(
    option: Option, entry: Entry, source: Source, path: Path, chosen: dict[str, _Value], problems: list[str], vocabulary: Vocabulary
) -> None:
    label = f"{path}:{entry.line}: {option.yaml}"
    labels = {item: f"{path}:{line}: {option.yaml}" for item, line in entry.item_lines.items()}
    try:
        _choose(option, _Value(option.parse(entry.value), source, label, labels), chosen)
        problems += _unknown_names(option, chosen[option.name], vocabulary)
    except Unusable as error:
        problems += [f"{labels.get(item, label)}: {told}" for item, told in error.faults]


def _read_environment(environ: Mapping[str, str], chosen: dict[str, _Value], problems: list[str], vocabulary: Vocabulary) -> None:
    for option in OPTIONS.values():
        if option.env is None or not environ.get(option.env, "").strip():
            continue
        try:
            value = option.parse(environ[option.env])
        except Unusable as error:
            problems += [f"{option.env}: {told}" for _, told in error.faults]
            continue
        _choose(option, _Value(value, Source(ENVIRONMENT, option.env), option.env), chosen)
        problems += _unknown_names(option, chosen[option.name], vocabulary)


def _set_aside(chosen: dict[str, _Value], black: str, white: str) -> None:
    """A whitelist is in force; what the blacklist was is kept for who asks where its value came from."""
    value = chosen[black]
    note = f"[{', '.join(value.value)}] of {value.source.where}, set aside by {white}"
    chosen[black] = _Value(None, Source(DEFAULT, note), value.label)


def _clashing_lists(chosen: dict[str, _Value]) -> Iterator[str]:
    """A whitelist beats a blacklist of a weaker place; otherwise the two together are a contradiction.

    But for a profile's: it may have both (what is faster, and what does not work), and a user's blacklist is
    taken off its whitelist; see :func:`_settle_lists`.
    """
    for white, black in _PAIRS:
        first, second = chosen.get(white), chosen.get(black)
        if first is None or second is None or first.value is None or second.value is None:
            continue
        if first.source.place > second.source.place:
            _set_aside(chosen, black, white)
            continue
        if first.source.place == PROFILE_PLACE:
            continue
        yield (
            f"{first.label} and {second.label}: give one or the other, not both"
            + (f" (set {white}: null in a file to drop the weaker list)" if first.source.place != second.source.place else "")
        )


def _unknown_names(option: Option, value: _Value, vocabulary: Vocabulary) -> Iterator[str]:
    if option.name == "op_backends":
        for op, order in value.value:
            problem = vocabulary.problem_with("operators", op)
            if problem:
                yield f"{value.blame(op)}: {problem}"
            for token in order:
                problem = vocabulary.problem_with_token(token)
                if problem:
                    yield f"{value.blame(op)}: {op}: {problem}"
            if len(set(order)) < len(order):
                yield f"{value.blame(op)}: {op}: {'|'.join(order)!r} names a backend twice"
    elif option.names:
        for word in value.value or ():
            if option.name == "oot_blacklist" and word in vocabulary.not_covered:
                continue
            problem = vocabulary.problem_with(option.names, word)
            if problem:
                yield f"{value.blame(word)}: {problem}"


def _settle_lists(chosen: dict[str, _Value], in_profile: Mapping[str, _Value]) -> None:
    """Bring a user's blacklist and a profile's lists together: who asks for less does not get more.

    What a profile says does not work stays on the blacklist, unless a user's whitelist names it or ``null`` in a
    file puts the profile's list away. Of a whitelist and a blacklist, the whitelist is in force.
    """
    for white, black in _PAIRS:
        first, second, broken = chosen.get(white), chosen.get(black), in_profile.get(black)
        if second is None or second.value is None:
            continue
        if broken is not None and broken is not second and broken.value:
            names = tuple(dict.fromkeys((*second.value, *broken.value)))
            source = Source(second.source.place, f"{second.source.where} and {broken.source.where}")
            chosen[black] = second = _Value(names, source, second.label)
        if first is not None and first.value is not None:
            left = tuple(name for name in first.value if name not in second.value)
            if left != first.value:
                source = Source(first.source.place, f"{first.source.where} without {black} from {second.source.where}")
                chosen[white] = _Value(left, source, first.label)
            _set_aside(chosen, black, white)


def _join_orders(chosen: dict[str, _Value]) -> dict[str, Source]:
    """Join the orders of all places, operator by operator; returned is where each came from.

    A preference is about every operator, so it replaces single orders from a weaker place.
    """
    tables: list[_Value] = []
    table = chosen.get("op_backends")
    while table is not None:
        tables.append(table)
        table = table.weaker
    prefer = chosen.get("prefer")
    in_force = [table for table in tables if prefer is None or prefer.is_reset or prefer.source.place <= table.source.place]
    if not tables:
        return {}
    if not in_force:
        assert prefer is not None
        giving_way = " and ".join(table.source.where for table in tables if table.value)
        note = f"default; the orders of {giving_way} give way to prefer from {prefer.source.where}" if giving_way else "default"
        chosen["op_backends"] = _Value((), Source(DEFAULT, note), prefer.label)
        return {}
    orders: dict[str, tuple[str, ...]] = {}
    sources: dict[str, Source] = {}
    for table in reversed(in_force):
        orders |= dict(table.value)
        sources |= {op: table.source for op, _ in table.value}
    strongest = in_force[0]
    giving = [table.source for table in in_force if table.source in sources.values()]
    source = Source(strongest.source.place, " and ".join(each.where for each in giving)) if giving else strongest.source
    chosen["op_backends"] = _Value(tuple(orders.items()), source, strongest.label)
    return sources


def _give_way_to_prefer(chosen: dict[str, _Value]) -> None:
    """``prefer: flagos`` replaces a profile's ``flagos_whitelist``, a choice of what is faster.

    A profile's ``flagos_blacklist`` stays: it is about what does not work.
    """
    prefer, white = chosen.get("prefer"), chosen.get("flagos_whitelist")
    if prefer is None or prefer.is_reset or white is None:
        return
    if prefer.value == "flagos" and prefer.source.place > white.source.place == PROFILE_PLACE:
        note = f"default; the list of {white.source.where} gives way to prefer: flagos from {prefer.source.where}"
        chosen["flagos_whitelist"] = _Value(None, Source(DEFAULT, note), prefer.label)


def plugin_modules(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The modules that SGLANG_FL_PLUGIN_MODULES names, whatever else is wrong with the settings."""
    option = OPTIONS["plugin_modules"]
    return option.parse(environ.get(option.env or "", ""))


def settings_of_parent(environ: Mapping[str, str] | None = None) -> Settings | None:
    """The settings that the server's main process resolved, in a process that it started."""
    environ = os.environ if environ is None else environ
    if RESOLVED not in environ:
        return None
    handed = json.loads(environ[RESOLVED])
    # A process that was started later, with other variables, is no worker of that server.
    return Settings.from_json(handed["settings"]) if handed["variables"] == _variables(environ) else None


def settings_in_force() -> Settings:
    """What the server that started this process resolved; else what the environment says."""
    return settings_of_parent() or load_settings()


def hand_down(settings: Settings, environ: MutableMapping[str, str]) -> None:
    """Put settings into the environment that worker processes inherit."""
    environ[RESOLVED] = json.dumps({"settings": settings.to_json(), "variables": _variables(environ)})


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in sorted(VARIABLES | {"GEMS_VENDOR"}) if name in environ}
