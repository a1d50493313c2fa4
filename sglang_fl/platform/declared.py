# SPDX-License-Identifier: Apache-2.0
"""Loads and checks the classes that a package declares for its chip, and registers them with SGLang."""

import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, get_type_hints

import torch
from sglang.srt.platforms.interface import SRTPlatform

from .. import compat
from ..config.errors import SettingsError
from ..device import VendorPlatform, why_unusable
from ..device import declared as installed
from ..kernels.places import problem_with, problems_with_objects
from ..utils.packages import last_line, nearest
from ..utils.suggest import suggest
from .absent_packages import stands_in_for
from .hooks import PlatformHooks
from .out_of_tree import record

#: What SGLang takes a class for, by the choice that names it.
_BASES = {
    "attention_backends": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "kv_pools['mha']": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "kv_pools['mla']": "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool",
    "kv_pools['dsa']": "sglang.srt.mem_cache.memory_pool:DSATokenToKVPool",
    "paged_allocator": "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",
    "quantization": "sglang.srt.layers.quantization.base_config:QuantizationConfig",
}
#: The server arguments that say which attention serves.
_ATTENTION = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def load_class(declaration: VendorPlatform, field: str) -> Any:
    """The class that a field names.

    Raises:
        RuntimeError: it cannot be imported, or is no class.
    """
    path = declaration.classes()[field]
    try:
        found = pkgutil.resolve_name(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RuntimeError(describe(declaration, f"{field} {path!r} cannot be loaded: {last_line(error)}{nearest(error)}")) from error
    if not isinstance(found, type):
        raise RuntimeError(describe(declaration, f"{field} {path!r} is {found!r}, not a class"))
    return found


def describe(declaration: VendorPlatform, what: str) -> str:
    """What is wrong with a declaration, and whose it is."""
    origin = installed().origins.get(declaration.name, "a package")
    return f"the platform {declaration.name} that {origin} declares cannot be used: {what}"


class DeclaredAnswers(SRTPlatform):
    """The platform methods that a declaration answers; others are left to the next class, which may be SGLang's own."""

    declaration: VendorPlatform

    def get_graph_runner_cls(self) -> type | None:
        return self._class("graph_runner") or super().get_graph_runner_cls()

    def get_full_graph_backend_cls(self) -> type[Any]:
        return self._class("graph_backend") or super().get_full_graph_backend_cls()

    def get_piecewise_backend_cls(self) -> type | None:
        return self._class("piecewise_backend") or super().get_piecewise_backend_cls()

    def get_kv_pool_cls(self, *, kind: Any) -> type | None:
        return self._class(f"kv_pools[{kind!r}]") or super().get_kv_pool_cls(kind=kind)

    def get_paged_allocator_cls(self) -> type | None:
        return self._class("paged_allocator") or super().get_paged_allocator_cls()

    def get_quantization_config(self, quantization: str) -> type[Any] | None:
        return self._class(f"quantization[{quantization!r}]") or super().get_quantization_config(quantization)

    def get_speculative_graph_runner_cls(self, algorithm: str, phase: str) -> type | None:
        return self._class(f"draft_graph_runners[{phase!r}]") or super().get_speculative_graph_runner_cls(algorithm, phase)

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in self.declaration.speculative_algorithms

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend in self.declaration.draft_attention

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return next(iter(self.declaration.draft_attention), None) or super().get_default_speculative_draft_attention_backend(algorithm)

    def support_mamba_cache_extra_buffer(self) -> bool:
        return self.declaration.mamba_extra_buffer

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        where = self.declaration.group_device
        if where is None:
            return super().get_group_coordinator_device(local_rank)
        return torch.device(where) if where == "cpu" else torch.device(where, local_rank)

    def get_torch_distributed_backend_str(self) -> str:
        return self.declaration.collective or super().get_torch_distributed_backend_str()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        super().apply_server_args_defaults(server_args)
        if compat.argument_problems():  # what the user gave cannot be told from SGLang's defaults
            return
        for name, value in self.declaration.server_args.items():
            if not was_given(server_args, name):
                setattr(server_args, name, value)
        attention = self.declaration.attention or next(iter(self.declaration.attention_backends), None)
        if self.declaration.extends and attention and not any(was_given(server_args, name) for name in _ATTENTION):
            # SGLang asks its own platforms for no attention backend; for some it has filled in all three by now.
            for name in _ATTENTION:
                setattr(server_args, name, attention)

    def _class(self, field: str) -> Any:
        """The class that the declaration names; None leaves the choice to the next class."""
        return load_class(self.declaration, field) if field in self.declaration.classes() else None


def was_given(server_args: Any, name: str) -> bool:
    """Whether the user gave an argument a value other than SGLang's default. SGLang has filled some in by now."""
    given = record(server_args)
    return bool(given._raw_input.get(name) != getattr(type(given)(model_path=""), name))


def add_choices(declaration: VendorPlatform) -> None:
    """In each process, before arguments are parsed: what the declaration names can be asked for on the command line."""
    from sglang.srt.arg_groups import choices

    for known, more in (
        (choices.ATTENTION_BACKEND_CHOICES, declaration.attention_backends),
        (choices.DRAFT_ATTENTION_BACKEND_CHOICES, declaration.attention_backends),
        (choices.QUANTIZATION_CHOICES, declaration.quantization),
    ):
        known.extend(name for name in more if name not in known)
    if declaration.quantization:
        from sglang.srt.layers.quantization import QUANTIZATION_METHODS

        for name in declaration.quantization:
            QUANTIZATION_METHODS.setdefault(name, load_class(declaration, f"quantization[{name!r}]"))
    if declaration.extends:
        register_attention_backends(declaration)


def register_attention_backends(declaration: VendorPlatform) -> None:
    """In each process that runs a model. A name that SGLang has is left to it; the declaration's check says so."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    for name in declaration.attention_backends:
        if name not in ATTENTION_BACKENDS or ATTENTION_BACKENDS[name].__module__ == __name__:
            register_attention_backend(name)(_maker(declaration, name))


class DeclaredHooks(PlatformHooks):
    """The hooks, and what must happen whatever the package's own class does."""

    declaration: VendorPlatform
    #: What was wrong with the package's class, which is loaded in the middle of ``import sglang``, where nothing may be raised.
    load_error: str | None

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Raises SettingsError with all that is wrong with the declaration."""
        problems = self.declaration_problems()
        if problems:
            raise SettingsError(problems)
        super().apply_server_args_defaults(server_args)

    @classmethod
    def declaration_problems(cls) -> list[str]:
        """What is wrong with the declaration. All that it names is loaded: later it would fail with the weights in place."""
        return [*([cls.load_error] if cls.load_error else []), *_problems(cls.declaration)]

    def init_backend(self) -> None:
        """In each process that runs a model, before its runner is made, out of tree."""
        register_attention_backends(self.declaration)
        super().init_backend()  # type: ignore[misc]


def _maker(declaration: VendorPlatform, name: str) -> Callable[[Any], Any]:
    def make(runner: Any) -> Any:
        return load_class(declaration, f"attention_backends[{name!r}]")(runner)

    return make


def _problems(declaration: VendorPlatform) -> list[str]:
    if declaration.compile_backend is not None and (problem := _compiler_problem(declaration.compile_backend)):
        return [describe(declaration, f"compile_backend: {problem}")]  # modules of SGLang's that compile cannot be imported
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    problems = []
    for field in declaration.classes():
        if field == "platform_class":  # loaded already
            continue
        try:
            found = load_class(declaration, field)
        except RuntimeError as error:
            problems.append(str(error))
            continue
        base = _BASES.get(field, _BASES.get(field.partition("[")[0]))
        if base is not None and not issubclass(found, pkgutil.resolve_name(base)):
            problems.append(describe(declaration, f"{field} {declaration.classes()[field]!r} is not a subclass of SGLang's {base}"))
    for name in declaration.attention_backends:
        made = ATTENTION_BACKENDS.get(name)
        if made is not None and not made.__module__.startswith(__package__):
            problems.append(describe(declaration, f"SGLang has an attention backend {name!r} of its own; give it another name"))
    for target, given in declaration.kernels().items():
        problem = problem_with(target, given.takes_grid) or _load_problem(given.function)
        if problem is not None:
            problems.append(describe(declaration, f"sglang_kernels: {problem}"))
    functions = {target: given.function for target, given in declaration.kernels().items()}
    problems += [describe(declaration, f"sglang_kernels: {problem}") for problem in problems_with_objects(functions)]
    for package, provider in declaration.stand_ins.items():
        if provider is not None and stands_in_for(package) and (problem := _load_problem(provider)):
            problems.append(describe(declaration, f"stand_ins[{package!r}]: {problem}"))
    known = {*ATTENTION_BACKEND_CHOICES, *declaration.attention_backends}
    named = [*declaration.draft_attention, *([declaration.attention] if declaration.attention is not None else [])]
    for name in named:
        if name not in known:
            problems.append(describe(declaration, f"unknown attention backend {name!r}{suggest(name, known)}"))
    problems += [describe(declaration, problem) for problem in _word_problems(declaration)]
    for device_type in dict.fromkeys((declaration.row().device_type, declaration.group_device)):
        if device_type is not None and (unusable := why_unusable(torch, device_type)):
            problems.append(describe(declaration, unusable))
    return problems


def _load_problem(path: str) -> str | None:
    """Why a function, ``"module:function"``, or a module cannot be used, or None."""
    try:
        found = pkgutil.resolve_name(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{path!r} cannot be loaded: {last_line(error)}{nearest(error)}"
    return f"{path!r} is {found!r}, and no function" if ":" in path and not callable(found) else None


def _word_problems(declaration: VendorPlatform) -> Iterator[str]:
    """Names of SGLang's that it does not have, or not here."""
    from sglang.srt.arg_groups.arg_utils import field_names
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.utils import is_cuda_alike

    if declaration.group_device not in (None, "cuda") and is_cuda_alike():
        yield (
            f"group_device: on a PyTorch for CUDA or ROCm SGLang's groups of ranks are on cuda, not on {declaration.group_device!r}: "
            "it does not ask there; leave it out"
        )
    arguments = field_names(ServerArgs)
    for name in declaration.server_args:
        if name not in arguments:
            yield f"server_args: SGLang has no server argument {name!r}{suggest(name, arguments)}"
        elif "cuda_graph" in name:
            yield f"server_args: {name} is decided before SGLang asks a platform; use capabilities"
        elif problem := _argument_problem(declaration, name):
            yield f"server_args[{name!r}] {problem}"
    for name in declaration.speculative_algorithms:
        try:
            SpeculativeAlgorithm.from_string(name)  # of plugins too
        except ValueError:
            yield f"unknown speculative algorithm {name!r}{suggest(name, [algorithm.name for algorithm in SpeculativeAlgorithm])}"
    if declaration.collective is not None:
        known = torch.distributed.Backend.backend_list
        for part in declaration.collective.split(","):  # "cpu:gloo,mychip:mccl" has one for each device type
            name = part.rpartition(":")[2]
            if name not in known:
                yield f"collective: PyTorch has no torch.distributed backend {name!r} here{suggest(name, known)}"


def _argument_problem(declaration: VendorPlatform, name: str) -> str | None:
    """Why SGLang cannot take the value of a server argument, by the type and the choices that it declares for it."""
    import msgspec
    from sglang.srt.arg_groups.arg_utils import Arg
    from sglang.srt.server_args import ServerArgs

    value, hint = declaration.server_args[name], _hints(ServerArgs)[name]
    if value is None:
        return None  # left to SGLang
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        return f"cannot be {value!r}: {str(error).replace('null', 'None')}"
    except TypeError:  # msgspec has no rules for some, as for functions
        pass
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Arg)]
    choices = [choice for mark in marks for choice in mark.choices or ()]
    if name.endswith("attention_backend"):
        choices += declaration.attention_backends
    elif name.endswith("quantization"):
        choices += declaration.quantization
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if marks and marks[0].choices and item not in choices:
            return f"cannot be {item!r}{suggest(str(item), [str(choice) for choice in choices])}"
    return None


@cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record, include_extras=True)


def _compiler_problem(name: str) -> str | None:
    """Why PyTorch cannot compile with it. SGLang's modules that do so could not be imported."""
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        return f"PyTorch has no compiler {name!r}{suggest(name, known)}"
    try:
        torch.compile(lambda: None, backend=name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{name!r} cannot be loaded: {last_line(error)}"
    return None
