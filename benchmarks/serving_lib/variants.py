# SPDX-License-Identifier: Apache-2.0
"""What is compared: the same engine under different settings, which are environment variables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_fl.config.errors import suggest
from sglang_fl.config.options import PREFERENCES
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.tune.engine import DISPATCH_LOG, Engine

_OURS = re.compile(r"_?SGLANG_FL_.*|SGLANG_FLAGGEMS_.*|USE_FLAGGEMS|FLAGCX_PATH|SGLANG_PLUGINS")

#: The variables that make each built-in variant what it is.
BUILT_IN: dict[str, dict[str, str]] = {
    # No plugin has this name, so SGLang loads none: neither platforms nor general ones.
    "native": {"SGLANG_PLUGINS": "none"},
    "off": {"USE_FLAGGEMS": "0", "SGLANG_FL_PER_OP": ";".join(f"{op}=sglang" for op in OPERATORS)},
    "default": {},
    **{preference: {"SGLANG_FL_PREFER": preference} for preference in PREFERENCES},
    # FlagOS with FlagGems's kernels alone, and with this package's wherever there are some; "flagos" is as the profile says.
    **{
        name: {"SGLANG_FL_PREFER": "flagos", "SGLANG_FL_PER_OP": ";".join(f"{op}={first}flagos|vendor|reference" for op in OPERATORS)}
        for name, first in (("flaggems", ""), ("triton", "triton|"))
    },
    # Where FlagCX is, the shell's FLAGCX_PATH says. Strict: a fallback would be measured as FlagCX.
    "flagcx": {"SGLANG_FL_DIST_BACKEND": "flagcx", "SGLANG_FL_STRICT": "1"},
}
#: A variant with this after its name leaves out SGLang's own all-reduce for small messages.
_NO_CUSTOM = "-no-custom-ar"
#: Of each engine's Python. Random ones make processes that do the same differ in speed, for as long as they live.
HASH_SEED = "0"
#: A variant with this after its name is the same once more: how far apart two engines are that do not differ.
_AGAIN = "-again"


class BadVariant(ValueError):
    """A variant that does not exist, cannot be had here, or is not spelled ``NAME:VAR=VALUE,VAR=VALUE``."""


@dataclass(frozen=True)
class Variant:
    """A name, the variables that are set for it, and what it adds to the arguments of ``sglang.Engine``."""

    name: str
    settings: Mapping[str, str]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        return self.settings.get("SGLANG_PLUGINS") == "none"

    def environ(self, base: Mapping[str, str], dispatch_log: Path) -> dict[str, str]:
        """The environment of its engine: the machine's, without settings of sglang-fl, with its own, and the same hash seed for all."""
        environ = {name: value for name, value in base.items() if not _OURS.fullmatch(name)} | {"PYTHONHASHSEED": HASH_SEED}
        if self.native:
            environ.pop("SGLANG_PLATFORM", None)  # it would load that plugin past SGLANG_PLUGINS
        else:
            environ["SGLANG_FL_DISPATCH_LOG"] = str(dispatch_log)
        if self.settings.get("SGLANG_FL_DIST_BACKEND") == "flagcx" and "FLAGCX_PATH" in base:
            environ["FLAGCX_PATH"] = base["FLAGCX_PATH"]
        return environ | dict(self.settings)

    def engine(self, arguments: Mapping[str, Any], directory: Path, base: Mapping[str, str]) -> Engine:
        return Engine(self.name, {**arguments, **self.arguments}, directory, self.environ(base, directory / DISPATCH_LOG))


def default_names(plain_cpu: bool) -> tuple[str, ...]:
    return ("off", "default") if plain_cpu else ("native", "off", "default", "flagos")


def choose(names: Sequence[str], own: Sequence[str], plain_cpu: bool) -> list[Variant]:
    """The variants of a run, the baseline first.

    Args:
        names: built-in ones, or those of ``own``.
        own: ``NAME:VAR=VALUE,VAR=VALUE``; those that ``names`` lacks come last.
        plain_cpu: whether there is no accelerator.

    Raises:
        BadVariant: there is no such, or it cannot be had here.
    """
    known = dict(BUILT_IN)
    added = []
    for text in own:
        name, settings = _parse(text)
        known[name] = settings
        added.append(name)
    variants = []
    for name in dict.fromkeys([*names, *added]):
        once = name.removesuffix(_AGAIN)
        kind = once.removesuffix(_NO_CUSTOM)
        if kind not in known:
            raise BadVariant(f"no variant {name!r}{suggest(kind, tuple(known))}; there are {', '.join(known)}")
        variant = Variant(name, known[kind], {"disable_custom_all_reduce": True} if kind != once else {})
        if variant.native and plain_cpu:
            raise BadVariant(
                "native SGLang cannot serve on a plain CPU: its CPU engine needs kernels of its own build. "
                "Take 'off' as the baseline, which is SGLang's own layers on sglang-fl's platform: --variants off,default"
            )
        variants.append(variant)
    return variants


def _parse(text: str) -> tuple[str, dict[str, str]]:
    name, colon, rest = text.partition(":")
    # A value may have commas; a comma before VAR= begins the next variable.
    pairs = [part.partition("=") for part in re.split(r",(?=[A-Za-z_][A-Za-z0-9_]*=)", rest)] if rest else []
    if not name or not colon or not all(variable and equals for variable, equals, _ in pairs):
        raise BadVariant(f"--variant {text!r}: expected NAME:VAR=VALUE,VAR=VALUE")
    return name, {variable: value for variable, _, value in pairs}
