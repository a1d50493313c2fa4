# SPDX-License-Identifier: Apache-2.0
"""A chip that an installed package brings up: what it declares, and who has declared one.

A package names its declaration in the entry-point group ``sglang_fl.platform``::

    [project.entry-points."sglang_fl.platform"]
    mychip = "sglang_fl_mychip.platform:PLATFORM"

The module that it lies in is imported in the middle of ``import sglang``, in every process, and by the command line:
it must import neither SGLang nor PyTorch nor a driver's library. What is heavy is named, as ``"module:Class"``, and
loaded where it is used.
"""

import glob
import importlib.util
import keyword
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..utils.packages import entries, importing, last_line, origin_of
from ..utils.suggest import suggest
from .vendors import ALIASES, VENDORS, Vendor, canonical

ENTRY_POINT_GROUP = "sglang_fl.platform"
#: The fields of SGLang's PlatformCapabilities, and the kinds of its KV pools.
CAPABILITIES = ("supports_triton", "graph_capture", "piecewise_graph", "hicache_device_kernels", "supports_pynccl")
KV_POOL_KINDS = ("mha", "mla", "dsa")
_WORDS = frozenset({"flagos", "reference", "vendor", "sglang", "template"})


@dataclass(frozen=True, kw_only=True)
class VendorPlatform:
    """A chip that SGLang does not know, as sglang-fl brings it up.

    Attributes:
        name: the vendor's name, as in ``vendor:<name>`` and GEMS_VENDOR: a lower-case Python identifier. That of a chip
            in sglang-fl's own table (metax, cambricon, …) takes that row's place; that of a chip which SGLang has a
            platform for itself is refused.
        device_type: the ``torch.device`` type that the chip's PyTorch build answers to.
        chip: what the chip is called, for people.
        device_files: what its kernel driver puts under ``/dev`` (glob patterns).
        commands: tools of its driver. The chip is taken for present if a device file or a command is found.
        is_present: decides instead, if given: a function of no arguments, called in the middle of ``import sglang``
            and by the command line, at most once in a process.
        collective: the ``torch.distributed`` backend that its PyTorch build registers.
        attention: the attention backend to serve with when the user names none. None: the first of
            ``attention_backends``, or else ``torch_native``.
        attention_backends: attention backends that the package brings, name -> ``"module:Class"``. Each is registered
            under SGLang's ``register_attention_backend`` and is made with SGLang's model runner as its only argument;
            ``--attention-backend`` takes the name.
        graph_runner: SGLang's ``get_graph_runner_cls``: the decode graph runner, needed with ``graph_capture``.
        graph_backend: ``get_full_graph_backend_cls``: what captures and replays a whole graph.
        piecewise_backend: ``get_piecewise_backend_cls``, for ``piecewise_graph``.
        kv_pools: ``get_kv_pool_cls``: ``mha``, ``mla`` or ``dsa`` -> a subclass of SGLang's pool of that kind.
        paged_allocator: ``get_paged_allocator_cls``.
        capabilities: names of :data:`CAPABILITIES`; see SGLang's ``PlatformCapabilities``.
        flaggems: whether FlagGems serves the chip.
        profile: a YAML file with the settings to use on the chip when the user gives none.
        platform_class: a class whose methods answer whatever else SGLang asks its platform
            (``sglang.srt.platforms.interface.SRTPlatform``); it has the last word over this declaration. It is
            imported in the middle of ``import sglang``, so its module may not import ``sglang.srt.utils`` or anything heavy.

    Classes are written ``"module:Class"``.

    Raises:
        ValueError: a value cannot be what it says; the text names the nearest that can.
        TypeError: there is no such choice; the text names the nearest.
    """

    name: str
    device_type: str
    chip: str = ""
    device_files: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    is_present: Callable[[], bool] | None = None
    collective: str = "gloo"
    attention: str | None = None
    attention_backends: Mapping[str, str] = field(default_factory=dict)
    graph_runner: str | None = None
    graph_backend: str | None = None
    piecewise_backend: str | None = None
    kv_pools: Mapping[str, str] = field(default_factory=dict)
    paged_allocator: str | None = None
    capabilities: tuple[str, ...] = ()
    flaggems: bool = False
    profile: Path | str | None = None
    platform_class: str | None = None

    def __new__(cls, **choices: Any) -> "VendorPlatform":
        names = [choice.name for choice in fields(cls)]
        unknown = [f"no choice {name!r}{suggest(name, names)}" for name in choices if name not in names]
        if unknown:
            raise TypeError(f"VendorPlatform has {'; '.join(unknown)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problem = _why_no_name(self.name) or self._shape_problem() or self._value_problem()
        if problem:
            raise ValueError(problem)

    def _shape_problem(self) -> str | None:
        for name in ("device_files", "commands", "capabilities"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
                return f"{name} is a tuple of texts, not {value!r}"
        for name in ("attention_backends", "kv_pools"):
            if not isinstance(getattr(self, name), Mapping):
                return f"{name} is a mapping from names to 'module:Class', not {getattr(self, name)!r}"
        for name in ("chip", "collective", "attention"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "attention" and value is None):
                return f"{name} is a text, not {value!r}"
        if not isinstance(self.flaggems, bool):
            return f"flaggems is True or False, not {self.flaggems!r}"
        if self.is_present is not None and not callable(self.is_present):
            return f"is_present is a function of no arguments, not {self.is_present!r}"
        for name, path in self.classes().items():
            module, colon, attribute = path.partition(":") if isinstance(path, str) else ("", "", "")
            if not (colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))):
                return f"{name} is written 'module:Class', not {path!r}"
        return None

    def _value_problem(self) -> str | None:
        if not isinstance(self.device_type, str) or not self.device_type.isidentifier():
            return f"device_type is the name of a torch.device type, not {self.device_type!r}"
        if not (self.device_files or self.commands or self.is_present):
            return "device_files, commands or is_present must tell whether the chip is there"
        for what, words, valid in (("capability", self.capabilities, CAPABILITIES), ("kind of KV pool", self.kv_pools, KV_POOL_KINDS)):
            for word in words:
                if word not in valid:
                    return f"unknown {what} {word!r}{suggest(word, valid)}"
        if "graph_capture" in self.capabilities and not (self.graph_runner or self.platform_class):
            return "graph_capture needs a graph_runner: SGLang's own are for its own devices"
        if self.profile is not None and not Path(self.profile).is_file():
            return f"profile: there is no file {str(self.profile)!r}"
        return None

    def classes(self) -> dict[str, str]:
        """What is named as ``"module:Class"``, by the field it stands in."""
        single = ("graph_runner", "graph_backend", "piecewise_backend", "paged_allocator", "platform_class")
        found = {name: getattr(self, name) for name in single if getattr(self, name) is not None}
        found |= {f"attention_backends[{name!r}]": path for name, path in self.attention_backends.items()}
        return found | {f"kv_pools[{kind!r}]": path for kind, path in self.kv_pools.items()}

    def row(self) -> Vendor:
        """The declaration as a row of the vendors' table."""
        attention = self.attention or next(iter(self.attention_backends), "torch_native")
        chip = self.chip or self.name
        return Vendor(
            self.name,
            chip,
            self.device_type,
            None,
            self.collective,
            attention,
            tuple(self.commands),
            tuple(self.device_files),
            flaggems=self.flaggems,
        )

    def trace(self) -> str | None:
        """What shows that the chip is there, or None. May raise what ``is_present`` raises."""
        if self.is_present is not None:
            return "its package says so" if self.is_present() else None
        for pattern in self.device_files:
            if glob.glob(pattern):
                return f"device file {pattern}"
        return next((f"{command} on PATH" for command in self.commands if shutil.which(command)), None)


def why_no_identifier(name: Any) -> str | None:
    """Why no vendor can have this name, or None."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or not name.isascii():
        near = "".join(c if c.isalnum() and c.isascii() else "_" for c in str(name).strip().lower()).strip("_")
        hint = f"; did you mean {near!r}?" if near.isidentifier() and not keyword.iskeyword(near) else ""
        return f"a vendor's name is a Python identifier in lower case, and {name!r} is none{hint}"
    if name in _WORDS:
        return f"{name!r} is a word of the settings, and no vendor's name"
    if name in ALIASES:
        return f"{name!r} is another name for {canonical(name)!r}"
    return None


def _why_no_name(name: Any) -> str | None:
    """Why a package cannot bring up a chip under this name, or None."""
    told = why_no_identifier(name)
    if told is None and (name == "cpu" or (name in VENDORS and VENDORS[name].in_tree is not None)):
        return f"SGLang or sglang-fl has a platform for {name!r} of its own; a package brings operators for it, not a platform"
    return told


@dataclass(frozen=True)
class Declared:
    """The platforms that installed packages declare, by name; who declares each; and what is wrong."""

    platforms: Mapping[str, VendorPlatform]
    origins: Mapping[str, str]
    problems: tuple[str, ...]


@lru_cache(maxsize=1)
def declared() -> Declared:
    """What installed packages declare. One that cannot be read is a problem, and the rest goes on."""
    platforms: dict[str, VendorPlatform] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for entry in entries(ENTRY_POINT_GROUP):
        origin = origin_of(entry)
        try:
            with importing(origin):
                platform = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problems.append(f"the platform that {origin} declares cannot be used: {last_line(error)}")
            continue
        if not isinstance(platform, VendorPlatform):
            problems.append(f"the platform that {origin} declares cannot be used: {entry.value} is {platform!r}, and not a VendorPlatform")
        elif platforms.get(platform.name) is platform:
            continue
        elif platform.name in platforms:
            problems.append(f"both {origins[platform.name]} and {origin} declare a platform {platform.name}; uninstall one of them")
        else:
            platforms[platform.name], origins[platform.name] = platform, origin
    return Declared(platforms, origins, tuple(problems))


@lru_cache(maxsize=1)
def _present() -> tuple[dict[str, str], dict[str, str]]:
    """The declared platforms whose chip is there, each with what shows it; and those of which it cannot be told, with why."""
    found: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, platform in declared().platforms.items():
        origin = declared().origins[name]
        try:
            trace = platform.trace()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failed[name] = f"whether {name} is there cannot be told: is_present of {origin} raised {last_line(error)}"
            continue
        if trace is not None:
            found[name] = f"{trace}, package {origin}"
    return found, failed


def platform_here(environ: Mapping[str, str]) -> tuple[VendorPlatform, str] | None:
    """The declared platform to bring up and what speaks for it, or None.

    GEMS_VENDOR decides, whatever was detected. Of two whose chips are both there the first is returned, and
    :func:`platform_problems` says that one must be chosen.
    """
    forced = canonical(environ.get("GEMS_VENDOR", ""))
    platforms = declared().platforms
    if forced:
        return (platforms[forced], f"GEMS_VENDOR, package {declared().origins[forced]}") if forced in platforms else None
    return next(((platforms[name], evidence) for name, evidence in sorted(_present()[0].items())), None)


def platform_problems(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with the packages that declare platforms. Each must stop a server: it might run on the wrong one."""
    problems = list(declared().problems)
    here = platform_here(environ)
    if here is not None:
        problems += _missing_modules(here[0])
    if not canonical(environ.get("GEMS_VENDOR", "")):
        present, failed = _present()
        problems += failed.values()
        if len(present) > 1:
            told = "; ".join(f"{name} ({evidence})" for name, evidence in sorted(present.items()))
            problems.append(f"{len(present)} chips that packages bring up are there: {told}; set GEMS_VENDOR to the one to use")
    return problems


def _missing_modules(platform: VendorPlatform) -> list[str]:
    """Modules that a declaration names and that are not installed, told without importing them."""
    told = []
    for name, path in platform.classes().items():
        module = path.partition(":")[0]
        try:
            there = importlib.util.find_spec(module) is not None
        except ImportError:
            there = False
        if not there:
            origin = declared().origins[platform.name]
            told.append(f"the platform {platform.name} that {origin} declares cannot be used: {name}: there is no module {module!r}")
    return told


def platforms_told() -> list[str]:
    """Each declared platform, who declares it, and whether its chip is there, in words."""
    present, failed = _present()
    told = {name: "there" if name in present else "cannot be told" if name in failed else "not seen here" for name in declared().origins}
    return [f"{name} ({origin}): {told[name]}" for name, origin in sorted(declared().origins.items())]


def known_vendors() -> dict[str, Vendor]:
    """The vendors' table with the rows that installed packages declare."""
    return VENDORS | {name: platform.row() for name, platform in declared().platforms.items()}
