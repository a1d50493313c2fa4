# SPDX-License-Identifier: Apache-2.0
"""A chip that an installed package declares: its classes are loaded, checked and made known to SGLang here."""

import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from ..config.errors import SettingsError
from ..device import VendorPlatform, why_unusable
from ..device import declared as installed
from ..utils.packages import last_line
from ..utils.suggest import suggest
from .hooks import PlatformHooks

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
        raise RuntimeError(describe(declaration, f"{field} {path!r} cannot be loaded: {last_line(error)}")) from error
    if not isinstance(found, type):
        raise RuntimeError(describe(declaration, f"{field} {path!r} is {found!r}, and no class"))
    return found


def describe(declaration: VendorPlatform, what: str) -> str:
    """What is wrong with a declaration, and whose it is."""
    origin = installed().origins.get(declaration.name, "a package")
    return f"the platform {declaration.name} that {origin} declares cannot be used: {what}"


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
            problems.append(describe(declaration, f"{field} {declaration.classes()[field]!r} is no subclass of SGLang's {base}"))
    for name in declaration.attention_backends:
        made = ATTENTION_BACKENDS.get(name)
        if made is not None and not made.__module__.startswith(__package__):
            problems.append(describe(declaration, f"SGLang has an attention backend {name!r} of its own; give it another name"))
    known = {*ATTENTION_BACKEND_CHOICES, *declaration.attention_backends}
    if declaration.attention is not None and declaration.attention not in known:
        problems.append(
            describe(declaration, f"unknown attention backend {declaration.attention!r}{suggest(declaration.attention, known)}")
        )
    unusable = why_unusable(torch, declaration.device_type)
    return problems if unusable is None else [*problems, describe(declaration, unusable)]
