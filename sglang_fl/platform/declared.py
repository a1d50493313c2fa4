# SPDX-License-Identifier: Apache-2.0
"""The platform that an installed package declares, as classes that PlatformFL is made of.

As with ``platform``, nothing heavy may be imported at the top.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.interface import PlatformCapabilities

from ..config.errors import SettingsError
from ..device import why_unusable
from ..device.declared import VendorPlatform
from ..device.declared import declared as installed
from ..utils.packages import last_line
from ..utils.suggest import suggest

#: What SGLang takes a class for, by the choice that names it.
_BASES = {
    "attention_backends": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "kv_pools['mha']": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "kv_pools['mla']": "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool",
    "kv_pools['dsa']": "sglang.srt.mem_cache.memory_pool:DSATokenToKVPool",
    "paged_allocator": "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",
}


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
        raise RuntimeError(_told(declaration, f"{field} {path!r} cannot be loaded: {last_line(error)}")) from error
    if not isinstance(found, type):
        raise RuntimeError(_told(declaration, f"{field} {path!r} is {found!r}, and no class"))
    return found


def _told(declaration: VendorPlatform, what: str) -> str:
    origin = installed().origins.get(declaration.name, "a package")
    return f"the platform {declaration.name} that {origin} declares cannot be used: {what}"


class DeclaredMoments:
    """What must happen whatever the package's own class does: it goes before that."""

    declaration: VendorPlatform
    #: What was wrong with the package's class, which is loaded in the middle of ``import sglang``, where nothing may be raised.
    broken: str | None

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Raises SettingsError with all that is wrong with the declaration."""
        problems = self.declaration_problems()
        if problems:
            raise SettingsError(problems)
        super().apply_server_args_defaults(server_args)  # type: ignore[misc]

    @classmethod
    def declaration_problems(cls) -> list[str]:
        """What is wrong with the declaration. All that it names is loaded: later it would fail with the weights in place."""
        return [*([cls.broken] if cls.broken else []), *_problems(cls.declaration)]

    def init_backend(self) -> None:
        """In each process that runs a model, before its runner is made."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        for name in self.declaration.attention_backends:
            register_attention_backend(name)(_maker(self.declaration, name))
        super().init_backend()  # type: ignore[misc]


def _maker(declaration: VendorPlatform, name: str) -> Callable[[Any], Any]:
    def make(runner: Any) -> Any:
        return load_class(declaration, f"attention_backends[{name!r}]")(runner)

    return make


def _problems(declaration: VendorPlatform) -> list[str]:
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
            problems.append(_told(declaration, f"{field} {declaration.classes()[field]!r} is no subclass of SGLang's {base}"))
    for name in declaration.attention_backends:
        made = ATTENTION_BACKENDS.get(name)
        if made is not None and not made.__module__.startswith(__package__):
            problems.append(_told(declaration, f"SGLang has an attention backend {name!r} of its own; give it another name"))
    known = {*ATTENTION_BACKEND_CHOICES, *declaration.attention_backends}
    if declaration.attention is not None and declaration.attention not in known:
        problems.append(_told(declaration, f"unknown attention backend {declaration.attention!r}{suggest(declaration.attention, known)}"))
    unusable = why_unusable(torch, declaration.device_type)
    return problems if unusable is None else [*problems, _told(declaration, unusable)]


class DeclaredAnswers:
    """What a declaration says, in the words of SGLang's platform interface. It goes behind the package's own class."""

    declaration: VendorPlatform

    def _declared_class(self, field: str) -> Any:
        return load_class(self.declaration, field) if field in self.declaration.classes() else None

    def get_graph_runner_cls(self) -> type | None:
        return self._declared_class("graph_runner")

    def get_full_graph_backend_cls(self) -> type[Any]:
        return self._declared_class("graph_backend")

    def get_piecewise_backend_cls(self) -> type | None:
        return self._declared_class("piecewise_backend")

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        return self._declared_class(f"kv_pools[{kind!r}]")

    def get_paged_allocator_cls(self) -> type | None:
        return self._declared_class("paged_allocator")


def declared_bases(declaration: VendorPlatform, device: type) -> tuple[type, ...]:
    """The classes that a platform is made of, in order, the one for the device type last."""
    capabilities = PlatformCapabilities(**dict.fromkeys(declaration.capabilities, True))
    answers = type("DeclaredAnswers", (DeclaredAnswers,), {"declaration": declaration, "capabilities": capabilities})
    bases: tuple[type, ...] = (answers, device)
    broken = None
    if declaration.platform_class is not None:
        try:
            bases = (load_class(declaration, "platform_class"), *bases)
            type("Together", bases, {})
        except RuntimeError as error:
            broken = str(error)
        except TypeError as error:
            broken = _told(
                declaration, f"platform_class {declaration.platform_class!r} cannot be combined with SGLang's: {last_line(error)}"
            )
            bases = (answers, device)
    return (type("DeclaredMoments", (DeclaredMoments,), {"declaration": declaration, "broken": broken}), *bases)
