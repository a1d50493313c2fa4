# SPDX-License-Identifier: Apache-2.0
"""The chips that installed packages declare: found through entry points, checked, and looked for on this machine."""

import importlib.util
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from ..utils.packages import entries, importing, last_line, origin_of
from .declaration import ENTRY_POINT_GROUP, VendorPlatform
from .vendors import VENDORS, Vendor, canonical

#: What no module of a declaration may import: SGLang imports it before it has imported all of itself.
_TOO_HEAVY = frozenset({"torch", "sglang"})


class Declared(NamedTuple):
    """The platforms that installed packages declare, by name; who declares each; and what is wrong.

    ``heavy`` has what each package's module was the first in this process to import, of what it should not.
    """

    platforms: Mapping[str, VendorPlatform]
    origins: Mapping[str, str]
    problems: tuple[str, ...]
    heavy: Mapping[str, str]


@lru_cache(maxsize=1)
def declared() -> Declared:
    """The declarations of installed packages. One that cannot be read is reported; the others are used."""
    platforms: dict[str, VendorPlatform] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    heavy: dict[str, str] = {}
    for entry in entries(ENTRY_POINT_GROUP):
        origin = origin_of(entry)
        before = _TOO_HEAVY & sys.modules.keys()
        try:
            with importing(origin):
                platform = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            module = sys.modules.get(entry.module)
            reason = last_line(error)
            if getattr(getattr(module, "__spec__", None), "_initializing", False):  # asked for by what the module itself imports
                reason = "its module imports SGLang, which asks for platforms at once; import it where it is used"
            problems.append(f"the platform that {origin} declares cannot be used: {reason}")
            continue
        if not isinstance(platform, VendorPlatform):
            problems.append(f"the platform that {origin} declares cannot be used: {entry.value} is {platform!r}, not a VendorPlatform")
        elif platforms.get(platform.name) is platform:
            continue
        elif platform.name in platforms:
            problems.append(f"both {origins[platform.name]} and {origin} declare a platform {platform.name}; uninstall one of them")
        else:
            platforms[platform.name], origins[platform.name] = platform, origin
        if imported := (_TOO_HEAVY & sys.modules.keys()) - before:
            heavy[origin] = " and ".join(sorted(imported))
    return Declared(platforms, origins, tuple(problems), heavy)


def known_vendors() -> dict[str, Vendor]:
    """The vendors' table with the rows that installed packages declare."""
    return VENDORS | {name: platform.row() for name, platform in declared().platforms.items()}


def platform_here(environ: Mapping[str, str]) -> tuple[VendorPlatform, str] | None:
    """The declared chip to use of those that SGLang does not know, with the evidence for it, or None.

    GEMS_VENDOR decides, whatever was detected. Of two whose chips are both here the first is returned, and
    :func:`platform_problems` says that one must be chosen.
    """
    forced = canonical(environ.get("GEMS_VENDOR", ""))
    platforms, origins, *_ = declared()
    if forced:
        asked = platforms.get(forced)
        return (asked, f"GEMS_VENDOR, package {origins[forced]}") if asked is not None and not asked.extends else None
    return next(((platforms[name], evidence) for name, evidence in sorted(_chips_here()[0].items())), None)


def platform_problems(environ: Mapping[str, str], vendor: str) -> list[str]:
    """What is wrong with the packages that declare platforms, on a device of this vendor. Each must stop a server."""
    problems = list(declared().problems)
    here = declared().platforms.get(vendor)
    if here is not None:
        problems += _missing_modules(here)
    if not canonical(environ.get("GEMS_VENDOR", "")):
        present, failed = _chips_here()
        problems += failed.values()
        if len(present) > 1:
            chips = "; ".join(f"{name} ({evidence})" for name, evidence in sorted(present.items()))
            problems.append(f"{len(present)} packages detect their chips: {chips}; set GEMS_VENDOR to the one to use")
    return problems


def describe_platforms() -> list[str]:
    """Each declared platform, who declares it, and whether its chip is here, one line each."""
    present, failed = _chips_here()
    state = {name: "found" if name in present else "unknown" if name in failed else "not detected" for name in declared().origins}
    state |= {name: f"adds to SGLang's {platform.extends} platform" for name, platform in declared().platforms.items() if platform.extends}
    return [f"{name} ({origin}): {state[name]}" for name, origin in sorted(declared().origins.items())]


@lru_cache(maxsize=1)
def _chips_here() -> tuple[dict[str, str], dict[str, str]]:
    """The declared platforms whose chip is here, each with its evidence; and those that could not say, each with the reason."""
    present: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, platform in declared().platforms.items():
        if platform.extends:
            continue
        origin = declared().origins[name]
        try:
            evidence = platform.evidence()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failed[name] = f"cannot tell whether {name} is here: is_present of {origin} raised {last_line(error)}"
            continue
        if evidence is not None:
            present[name] = f"{evidence}, package {origin}"
    return present, failed


def _missing_modules(platform: VendorPlatform) -> list[str]:
    """The modules that a declaration names and that are not installed. None is imported to find out."""
    problems = []
    stand_ins = {f"stand_ins[{name!r}]": module for name, module in platform.stand_ins.items() if module is not None}
    for name, path in (platform.classes() | stand_ins).items():
        module = path.partition(":")[0]
        try:
            installed = importlib.util.find_spec(module) is not None
        except ImportError:
            installed = False
        if not installed:
            origin = declared().origins[platform.name]
            problems.append(f"the platform {platform.name} that {origin} declares cannot be used: {name}: there is no module {module!r}")
    return problems
