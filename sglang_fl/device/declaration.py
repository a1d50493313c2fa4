# SPDX-License-Identifier: Apache-2.0
"""What a vendor's package declares for a chip that SGLang does not know, or to extend one that it knows.

A package names its declaration in the entry-point group ``sglang_fl.platform``::

    [project.entry-points."sglang_fl.platform"]
    mychip = "sglang_fl_mychip.platform:PLATFORM"

The declaration's module is imported during ``import sglang``, in every process, and by the command line: it must import
neither SGLang nor PyTorch nor a driver's library. Heavy classes are named as ``"module:Class"`` and loaded when needed.
"""

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ..utils.suggest import suggest
from .drivers import command, device_file
from .kernels import KernelReplacement, refuse_unknown_fields, replacement, target_problem
from .vendors import ALIASES, CUDA_CAPABILITIES, VENDORS, Vendor, canonical

ENTRY_POINT_GROUP = "sglang_fl.platform"
#: The fields of SGLang's PlatformCapabilities, and the kinds of its KV pools.
CAPABILITIES = ("supports_triton", "graph_capture", "piecewise_graph", "hicache_device_kernels", "supports_pynccl")
KV_POOL_KINDS = ("mha", "mla", "dsa")
#: The phases of a draft model for which SGLang asks for a graph runner.
DRAFT_PHASES = ("draft_decode", "draft_extend")
#: Packages that SGLang imports, and that a package may stand in for where they cannot be used.
STAND_INS = ("sgl_kernel", "flashinfer", "deep_gemm", "triton")
#: What SGLang asks of out-of-tree platforms only: it would have no effect on a chip that SGLang has a platform for.
OUT_OF_TREE_ONLY = (
    "capabilities", "graph_backend", "compile_backend", "group_device", "quantization",
    "speculative_algorithms", "draft_attention", "draft_graph_runners", "mamba_extra_buffer",
)  # fmt: skip
#: Fields that map names to classes.
_CLASSES_BY_NAME = ("attention_backends", "kv_pools", "draft_graph_runners", "quantization")
#: Fields that map names to something else.
_OTHER_MAPPINGS = {"server_args": "values", "sglang_kernels": "'module:function'", "stand_ins": "a module or None"}
#: Words that mean something else in the settings.
_RESERVED_NAMES = frozenset(
    {"flagos", "triton", "reference", "vendor", "sglang", "template", "all", "none", "null", "true", "false", "yes", "no", "on", "off"}
)

#: What FlagOS's other plugins, or SGLang, call what a field is for.
_OTHER_NAMES = {
    "dist_backend": "it is called 'collective'",
    "patches": "a package changes SGLang through its hooks (docs/vendors.md)",
}


@dataclass(frozen=True, kw_only=True)
class VendorPlatform:
    """A chip that SGLang does not know, or what a package adds to a chip that SGLang has a platform for.

    >>> platform = VendorPlatform(name="fastchip", device_type="fast", device_files=("fastchip*",), capabilities=("supports_triton",))
    >>> VendorPlatform(name="fastchip", device_typ="fast")
    Traceback (most recent call last):
        ...
    TypeError: VendorPlatform: unknown field 'device_typ'; did you mean 'device_type'?

    Attributes:
        name: the vendor's name, as in ``vendor:<name>`` and GEMS_VENDOR: a lower-case Python identifier. A chip of sglang-fl's
            own table (metax, cambricon, …) keeps what the table knows of it where the declaration says nothing. A chip that
            SGLang has a platform for (ascend, mthreads, thead, amd, intel, …) keeps SGLang's platform and its detection: the
            declaration adds to them, and the fields of :data:`OUT_OF_TREE_ONLY` are refused.
        device_type: the ``torch.device`` type that the chip's PyTorch build answers to. Needed unless the table knows it.
        chip: the chip's name, for people.
        device_files: what its kernel driver puts under ``/dev`` (glob patterns).
        commands: tools of its driver. The chip is taken for present if a device file or a command is found.
        is_present: decides instead, if given: a function of no arguments, called in the middle of ``import sglang``
            and by the command line, at most once in a process.
        collective: the ``torch.distributed`` backend that its PyTorch build registers; ``gloo`` if nothing is known.
        group_device: the device type to which SGLang binds its groups of ranks, if it is not the chip's own, as in ``"cpu"``. On a
            PyTorch for CUDA or ROCm SGLang does not ask for it.
        attention: the attention backend to serve with when the user names none. None: the first of
            ``attention_backends``, or else ``torch_native``.
        attention_backends: attention backends that the package brings, name -> ``"module:Class"``. Each is registered
            under SGLang's ``register_attention_backend`` and is made with SGLang's model runner as its only argument;
            ``--attention-backend`` takes the name.
        graph_runner: SGLang's ``get_graph_runner_cls``: the decode graph runner, needed with ``graph_capture`` unless
            ``device_type`` is ``cuda``, where SGLang's own captures.
        graph_backend: ``get_full_graph_backend_cls``: what captures and replays a whole graph.
        piecewise_backend: ``get_piecewise_backend_cls``, for ``piecewise_graph``. Servers of SGLang 0.5.23 never call it: they use
            SGLang's own breakable prefill graphs.
        kv_pools: ``get_kv_pool_cls``: ``mha``, ``mla`` or ``dsa`` -> a subclass of SGLang's pool of that kind.
        paged_allocator: ``get_paged_allocator_cls``.
        mamba_extra_buffer: ``support_mamba_cache_extra_buffer``: hybrid models may keep snapshots of their state.
        capabilities: names of :data:`CAPABILITIES`; see SGLang's ``PlatformCapabilities``. ``supports_pynccl`` makes SGLang
            use PyNccl. None: what the table knows, or for ``device_type`` ``cuda`` Triton and graphs, or else nothing.
        compile_backend: what ``torch.compile`` uses: ``inductor``, ``eager`` where Inductor has no driver for the chip, or a compiler
            that a package registers under PyTorch's entry-point group ``torch_dynamo_backends``.
        speculative_algorithms: ``supports_speculative_algorithm``: what ``--speculative-algorithm`` may name.
        draft_attention: ``supports_speculative_draft_attention_backend``: the attention backends of draft models for DFLASH;
            the first is the default.
        draft_graph_runners: ``get_speculative_graph_runner_cls``: ``draft_decode`` or ``draft_extend`` -> a graph runner of
            draft models. A phase that is not here runs without graphs. A chip that imitates CUDA may name SGLang's own.
        quantization: ``get_quantization_config``: a method of ``--quantization`` -> a subclass of SGLang's
            ``QuantizationConfig``; a name that SGLang does not have becomes one.
        sglang_kernels: what runs in the place of kernels that SGLang calls outside of its layers, ``"sglang.module:name"`` ->
            ``"module:function"`` or a :class:`KernelReplacement`. They are implementations ``vendor.<name>`` like those of operators:
            orders and lists of vendors hold for them.
        stand_ins: what stands in for packages that are not installed or cannot be imported (``triton``: or has no driver), a name of
            :data:`STAND_INS` -> the module that has what the chip's package provides of it, or None: nothing. Where ``"fastpkg.sglk"``
            stands in for ``sgl_kernel``, SGLang finds ``fastpkg.sglk.f`` as ``sgl_kernel.f``, and ``fastpkg.sglk.part.f`` as
            ``sgl_kernel.part.f``. All else can be imported, and raises an error with its name when it is called. For ``triton`` a
            server is started with ``sglang-fl serve``.
        hide_installed: those of ``stand_ins`` that are stood in for even where they can be imported, as builds for another chip can.
        server_args: defaults of SGLang's server arguments on the chip, as in ``{"page_size": 128}``; what the user gives goes before.
        variables: environment variables that the package reads. A name that is nearly one of them is reported as a misspelling.
        flaggems: whether FlagGems serves the chip. None: what the table knows, or else no.
        profile: a YAML file with the settings to use on the chip when the user gives none. It is read over the profile that sglang-fl
            ships for the chip, and its ``flagos_broken`` adds to the shipped list.
        platform_class: a class whose methods answer whatever else SGLang asks its platform
            (``sglang.srt.platforms.interface.SRTPlatform``); it has the last word over this declaration, and on a chip that SGLang
            knows stands before SGLang's own class. It is
            imported in the middle of ``import sglang``, so its module may not import ``sglang.srt.utils`` or anything heavy.

    Classes are written ``"module:Class"``.

    Raises:
        ValueError: a value is not valid; the message names the nearest valid one.
        TypeError: there is no such field; the message names the nearest.
    """

    name: str
    device_type: str = ""
    chip: str = ""
    device_files: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    is_present: Callable[[], bool] | None = None
    collective: str | None = None
    group_device: str | None = None
    attention: str | None = None
    attention_backends: Mapping[str, str] = field(default_factory=dict)
    graph_runner: str | None = None
    graph_backend: str | None = None
    piecewise_backend: str | None = None
    kv_pools: Mapping[str, str] = field(default_factory=dict)
    paged_allocator: str | None = None
    mamba_extra_buffer: bool = False
    capabilities: tuple[str, ...] | None = None
    compile_backend: str | None = None
    speculative_algorithms: tuple[str, ...] = ()
    draft_attention: tuple[str, ...] = ()
    draft_graph_runners: Mapping[str, str] = field(default_factory=dict)
    quantization: Mapping[str, str] = field(default_factory=dict)
    sglang_kernels: Mapping[str, str | KernelReplacement] = field(default_factory=dict)
    stand_ins: Mapping[str, str | None] = field(default_factory=dict)
    hide_installed: tuple[str, ...] = ()
    server_args: Mapping[str, Any] = field(default_factory=dict)
    variables: tuple[str, ...] = ()
    flaggems: bool | None = None
    profile: Path | str | None = None
    platform_class: str | None = None

    def __new__(cls, *by_position: Any, **given: Any) -> "VendorPlatform":
        if by_position:
            raise TypeError(f"VendorPlatform: each field is given by its name, as in name={by_position[0]!r}")
        refuse_unknown_fields(cls, given, _OTHER_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problem = _platform_name_problem(self.name) or self._shape_problem() or self._value_problem()
        if problem:
            raise ValueError(problem)

    @property
    def extends(self) -> str | None:
        """SGLang's own platform that this declaration adds to, or None: it brings up a chip that SGLang does not know."""
        known = VENDORS.get(self.name)
        return known.in_tree if known is not None else None

    def _shape_problem(self) -> str | None:
        for name in (
            "device_files",
            "commands",
            "capabilities",
            "speculative_algorithms",
            "draft_attention",
            "variables",
            "hide_installed",
        ):
            value = getattr(self, name)
            if name == "capabilities" and value is None:
                continue
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
                return f"{name} must be a tuple of strings, not {value!r}"
            if "" in value:
                return f"{name}: leave out the empty string, {value!r}"
        for name, to in dict.fromkeys(_CLASSES_BY_NAME, "'module:Class'").items() | _OTHER_MAPPINGS.items():
            if not isinstance(getattr(self, name), Mapping) or not all(isinstance(key, str) and key for key in getattr(self, name)):
                return f"{name} must map names to {to}, not {getattr(self, name)!r}"
        for name in ("device_type", "chip", "collective", "group_device", "attention", "compile_backend"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name not in ("device_type", "chip")):
                return f"{name} must be a string, not {value!r}"
        for name in ("flaggems", "mamba_extra_buffer"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "flaggems"):
                return f"{name} must be True or False, not {value!r}"
        for name in ("collective", "compile_backend", "attention"):
            if getattr(self, name) == "":
                return f"{name} must not be empty; leave it out"
        if self.group_device is not None and not self.group_device.isidentifier():
            return f"group_device must be the name of a torch.device type without an index, not {self.group_device!r}"
        if not isinstance(self.profile, (str, Path, NoneType)):
            return f"profile must be the name of a file, not {self.profile!r}"
        for variable in self.variables:
            if not (variable.isidentifier() and variable.isascii()):
                return f"variables: {variable!r} is not the name of an environment variable"
        if self.is_present is not None and not callable(self.is_present):
            return f"is_present must be a function without arguments, not {self.is_present!r}"
        for name, path in self.classes().items():
            if not _is_path(path):
                return f"{name} must be written 'module:Class', not {path!r}"
        return self._kernels_problem()

    def _kernels_problem(self) -> str | None:
        for target, given in self.sglang_kernels.items():
            if problem := target_problem(target):
                return f"sglang_kernels: {problem}"
            if not _is_path(given.function if isinstance(given, KernelReplacement) else given):
                return f"sglang_kernels[{target!r}] must be 'module:function' or KernelReplacement('module:function', …), not {given!r}"
            for name in ("takes_grid", "writes_inputs", "batch_invariant"):
                if not isinstance(value := getattr(replacement(given), name), bool):
                    return f"sglang_kernels[{target!r}]: {name} must be True or False, not {value!r}"
        for package, provider in self.stand_ins.items():
            if package not in STAND_INS:
                return f"stand_ins: unknown package {package!r}{suggest(str(package), STAND_INS)}"
            if provider is not None and not (isinstance(provider, str) and _is_path(f"{provider}:x")):
                return f"stand_ins[{package!r}] must be the name of a module or None, not {provider!r}"
            if provider is not None and provider.partition(".")[0] == package:
                return f"stand_ins[{package!r}] must be a module of the chip's package, not {provider!r} itself"
        for package in self.hide_installed:
            if package not in self.stand_ins:
                return f"hide_installed: {package!r} is not one of stand_ins{suggest(package, self.stand_ins.keys())}"
        return None

    def kernels(self) -> dict[str, KernelReplacement]:
        """``sglang_kernels``, each as a :class:`KernelReplacement`."""
        return {target: replacement(given) for target, given in self.sglang_kernels.items()}

    def _value_problem(self) -> str | None:
        row = self.row()
        if not row.device_type.isidentifier():
            return f"device_type must be the name of a torch.device type, not {self.device_type!r}"
        if self.extends and (problem := self._extension_problem()):
            return problem
        for what, words, valid in (
            ("capability", self.capabilities or (), CAPABILITIES),
            ("kind of KV pool", self.kv_pools, KV_POOL_KINDS),
            ("phase of a draft model", self.draft_graph_runners, DRAFT_PHASES),
        ):
            for word in words:
                if word not in valid:
                    return f"unknown {what} {word!r}{suggest(word, valid)}"
        if self.extends:
            return self._profile_problem()
        if not (row.device_files or row.commands or self.is_present):
            return "give device_files, commands or is_present: otherwise the chip cannot be detected"
        if "graph_capture" in row.capabilities and row.device_type != "cuda" and not (self.graph_runner or self.platform_class):
            return "graph_capture needs a graph_runner: SGLang's own are for its own devices"
        return self._profile_problem()

    def _profile_problem(self) -> str | None:
        if self.profile is not None and not Path(self.profile).is_file():
            return f"profile: there is no file {str(self.profile)!r}"
        return None

    def _extension_problem(self) -> str | None:
        """Choices that are not valid for a chip that SGLang has a platform for."""
        for name in OUT_OF_TREE_ONLY:
            if getattr(self, name):
                return (
                    f"{name}: SGLang has a platform of its own for {self.name} ({self.extends}) and does not ask it for this; leave it "
                    "out, or change SGLang through its hooks (docs/vendors.md)"
                )
        for name in ("device_files", "commands", "is_present"):
            if getattr(self, name):
                return f"{name}: SGLang detects {self.name} itself; leave it out"
        if self.device_type not in ("", VENDORS[self.name].device_type):
            return f"device_type: for SGLang {self.name} is {VENDORS[self.name].device_type!r}, not {self.device_type!r}"
        return None

    def classes(self) -> dict[str, str]:
        """The classes that are named as ``"module:Class"``, by field."""
        single = ("graph_runner", "graph_backend", "piecewise_backend", "paged_allocator", "platform_class")
        found = {name: getattr(self, name) for name in single if getattr(self, name) is not None}
        return found | {f"{field}[{name!r}]": path for field in _CLASSES_BY_NAME for name, path in getattr(self, field).items()}

    def row(self) -> Vendor:
        """The declaration as a row of the vendors' table; what it leaves out is taken from the table."""
        row = VENDORS.get(self.name)
        if row is None or (self.device_type not in ("", row.device_type) and not self.extends):
            row = Vendor(self.name, self.name, self.device_type, None, "gloo", "torch_native", flaggems=False, capabilities=())
            if self.device_type == "cuda":
                row = replace(row, capabilities=CUDA_CAPABILITIES)
            elif self.device_type == "cpu":
                row = replace(row, compile_backend=VENDORS["cpu"].compile_backend)
        given: dict[str, Any] = {
            "chip": self.chip,
            "collective": self.collective,
            "attention": self.attention or next(iter(self.attention_backends), None),
            "commands": tuple(self.commands),
            "device_files": tuple(self.device_files),
            "flaggems": self.flaggems,
            "compile_backend": self.compile_backend,
        }
        row = replace(row, **{name: value for name, value in given.items() if value not in (None, "", ())})
        return row if self.capabilities is None else replace(row, capabilities=tuple(self.capabilities))

    def evidence(self) -> str | None:
        """Evidence that the chip is present, or None. May raise what ``is_present`` raises."""
        if self.is_present is not None:
            answer = self.is_present()
            if not isinstance(answer, bool):
                raise TypeError(f"is_present must return True or False, not {answer!r}")
            return "reported by its package" if answer else None
        row = self.row()
        return device_file(row.device_files) or command(row.commands)


def _is_path(path: Any) -> bool:
    module, colon, attribute = path.partition(":") if isinstance(path, str) else ("", "", "")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def name_problem(name: Any) -> str | None:
    """Why no vendor can have this name, or None."""
    usable = isinstance(name, str) and name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
    # A distribution's name ends with a letter or a digit.
    if not usable or name != name.lower() or name != name.strip("_"):
        near = "".join(c if c.isalnum() and c.isascii() else "_" for c in str(name).strip().lower()).strip("_")
        taken = keyword.iskeyword(near) or near in _RESERVED_NAMES or near in ALIASES
        hint = f"; did you mean {near!r}?" if near.isidentifier() and not taken else ""
        ends = " that begins and ends with a letter or digit" if usable and name != name.strip("_") else ""
        return f"a vendor's name must be a Python identifier in lower case{ends}, not {name!r}{hint}"
    if name in _RESERVED_NAMES:
        return f"{name!r} means something else in the settings; choose another name"
    if name in ALIASES:
        return f"{name!r} is another name for {canonical(name)!r}"
    return None


def _platform_name_problem(name: Any) -> str | None:
    """Why a package cannot bring up a chip under this name, or None."""
    return name_problem(name) or ("there is a platform for 'cpu' already, in sglang-fl" if name == "cpu" else None)
