# SPDX-License-Identifier: Apache-2.0
"""What a vendor's package writes to bring a chip that SGLang does not know.

A package names its declaration in the entry-point group ``sglang_fl.platform``::

    [project.entry-points."sglang_fl.platform"]
    mychip = "sglang_fl_mychip.platform:PLATFORM"

The declaration's module is imported during ``import sglang``, in every process, and by the command line: it must import
neither SGLang nor PyTorch nor a driver's library. Heavy classes are named as ``"module:Class"`` and loaded when needed.
"""

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..utils.suggest import suggest
from .drivers import command, device_file
from .vendors import ALIASES, VENDORS, Vendor, canonical

ENTRY_POINT_GROUP = "sglang_fl.platform"
#: The fields of SGLang's PlatformCapabilities, and the kinds of its KV pools.
CAPABILITIES = ("supports_triton", "graph_capture", "piecewise_graph", "hicache_device_kernels", "supports_pynccl")
KV_POOL_KINDS = ("mha", "mla", "dsa")
#: Words that mean something else in the settings.
_RESERVED_NAMES = frozenset({"flagos", "reference", "vendor", "sglang", "template"})


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
        ValueError: a value is not valid; the message names the nearest valid one.
        TypeError: there is no such field; the message names the nearest.
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

    def __new__(cls, **given: Any) -> "VendorPlatform":
        names = [field.name for field in fields(cls)]
        unknown = [f"unknown field {name!r}{suggest(name, names)}" for name in given if name not in names]
        if unknown:
            raise TypeError(f"VendorPlatform: {'; '.join(unknown)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problem = _platform_name_problem(self.name) or self._shape_problem() or self._value_problem()
        if problem:
            raise ValueError(problem)

    def _shape_problem(self) -> str | None:
        for name in ("device_files", "commands", "capabilities"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
                return f"{name} must be a tuple of strings, not {value!r}"
        for name in ("attention_backends", "kv_pools"):
            if not isinstance(getattr(self, name), Mapping):
                return f"{name} must map names to 'module:Class', not {getattr(self, name)!r}"
        for name in ("chip", "collective", "attention"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "attention" and value is None):
                return f"{name} must be a string, not {value!r}"
        if not isinstance(self.flaggems, bool):
            return f"flaggems must be True or False, not {self.flaggems!r}"
        if self.is_present is not None and not callable(self.is_present):
            return f"is_present must be a function without arguments, not {self.is_present!r}"
        for name, path in self.classes().items():
            module, colon, attribute = path.partition(":") if isinstance(path, str) else ("", "", "")
            if not (colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))):
                return f"{name} must be written 'module:Class', not {path!r}"
        return None

    def _value_problem(self) -> str | None:
        if not isinstance(self.device_type, str) or not self.device_type.isidentifier():
            return f"device_type must be the name of a torch.device type, not {self.device_type!r}"
        if not (self.device_files or self.commands or self.is_present):
            return "give device_files, commands or is_present: nothing tells whether the chip is there"
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
        """The classes that are named as ``"module:Class"``, by field."""
        single = ("graph_runner", "graph_backend", "piecewise_backend", "paged_allocator", "platform_class")
        found = {name: getattr(self, name) for name in single if getattr(self, name) is not None}
        found |= {f"attention_backends[{name!r}]": path for name, path in self.attention_backends.items()}
        return found | {f"kv_pools[{kind!r}]": path for kind, path in self.kv_pools.items()}

    def row(self) -> Vendor:
        """The declaration as a row of the vendors' table."""
        return Vendor(
            name=self.name,
            chip=self.chip or self.name,
            device_type=self.device_type,
            in_tree=None,
            collective=self.collective,
            attention=self.attention or next(iter(self.attention_backends), "torch_native"),
            commands=tuple(self.commands),
            device_files=tuple(self.device_files),
            flaggems=self.flaggems,
        )

    def evidence(self) -> str | None:
        """What shows that the chip is here, or None. May raise what ``is_present`` raises."""
        if self.is_present is not None:
            return "its package says so" if self.is_present() else None
        return device_file(self.device_files) or command(self.commands)


def name_problem(name: Any) -> str | None:
    """Why no vendor can have this name, or None."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or not name.isascii():
        near = "".join(c if c.isalnum() and c.isascii() else "_" for c in str(name).strip().lower()).strip("_")
        hint = f"; did you mean {near!r}?" if near.isidentifier() and not keyword.iskeyword(near) else ""
        return f"a vendor's name must be a Python identifier in lower case, not {name!r}{hint}"
    if name in _RESERVED_NAMES:
        return f"{name!r} means something else in the settings; choose another name"
    if name in ALIASES:
        return f"{name!r} is another name for {canonical(name)!r}"
    return None


def _platform_name_problem(name: Any) -> str | None:
    """Why a package cannot bring up a chip under this name, or None."""
    problem = name_problem(name)
    if problem is None and (name == "cpu" or (name in VENDORS and VENDORS[name].in_tree is not None)):
        return f"there is a platform for {name!r} already, in SGLang or sglang-fl; a package can bring operators for it, but no platform"
    return problem
