# SPDX-License-Identifier: Apache-2.0
"""A place where SGLang calls an operator, and where a forward can be put instead: a layer or a function."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...config import Settings
from .base import Bridge, Forward


@dataclass(frozen=True)
class Load:
    """How a model is loaded; all of its sockets are bound by it, and implementations are tried under it.

    Attributes:
        settings: of the policy, the one in force counts.
        deterministic: only implementations declared batch-invariant may be used.
        log_level: of what is logged once the model runs.
        operators: what replaces PyTorch's own operators in this process; a trial speaks for one of them.
        in_graphs: puts in force what is in force while a graph of the model is captured; None: none is captured.
        excluded: a trial's name -> why that implementation is left out: it ended an earlier start.
    """

    settings: Settings = field(default_factory=Settings)
    deterministic: bool = False
    log_level: int = logging.INFO
    operators: Any = None
    in_graphs: Callable[[], AbstractContextManager[Any]] | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)


class Socket(ABC):
    """A call site.

    Attributes:
        bridge: leads from SGLang's arguments to the operator's.
        name: SGLang's name for what is called there: a layer's class, or a function.
        names: those by which ``oot_whitelist`` and ``oot_blacklist`` may mean it.
        dtype, device: of the activations.
        load: the model's, the last one's if several models call it.
        is_tried: whether implementations are tried there before one is selected.
    """

    is_tried = True
    names: set[str]
    dtype: torch.dtype
    device: torch.device

    def __init__(self, bridge: Bridge, name: str, load: Load):
        self.bridge = bridge
        self.name = name
        self.load = load

    @property
    def op(self) -> str:
        return self.bridge.op

    @property
    @abstractmethod
    def subject(self) -> Any:
        """What its forwards are called with first: the layer, or the hook of a function."""

    @property
    @abstractmethod
    def trial_key(self) -> tuple[Any, ...]:
        """Equal for sockets for which one trial is valid."""

    @property
    @abstractmethod
    def own(self) -> Forward:
        """SGLang's forward, as a function of the subject and SGLang's arguments."""

    @abstractmethod
    def exclusion_reason(self) -> str | None:
        """Why SGLang keeps it whatever the policy says, or None."""

    @abstractmethod
    def trial(self, fn: Forward) -> None:
        """Run an implementation as serving will, on scratch tensors. Raises what is wrong with it."""

    def prepare(self) -> str | None:
        """Make it ready to take forwards; calls still go to SGLang. Returns why that cannot be done, or None."""
        return None

    @abstractmethod
    def install(self, forward: Forward | None) -> None:
        """Have SGLang call ``forward(subject, *sglang_args)``; None: SGLang's own again."""

    def count_pass(self) -> bool:
        """Count a call among the model's first passes. Returns whether the next call must be counted, too."""
        return False

    @staticmethod
    @abstractmethod
    def replace(subject: Any, installed: Forward, forward: Forward) -> None:
        """Put a forward in the place of another, if that one is still installed."""


class HookSocket(Socket):
    """A call site in whose place a hook stands. Its forwards are called with the hook first.

    Attributes:
        hook: calls go to its ``forward``, or to SGLang's function if that is None.
    """

    hook: Any

    @property
    def subject(self) -> Any:
        return self.hook

    @staticmethod
    def replace(subject: Any, installed: Forward, forward: Forward) -> None:
        if subject.forward is installed:
            subject.forward = forward


def mark_as_ours(forward: Forward) -> Forward:
    forward._is_sglang_fl = True  # type: ignore[attr-defined]
    return forward


def is_ours(function: Any) -> bool:
    """Whether a layer's forward was put there by this package."""
    return getattr(function, "_is_sglang_fl", False) is True
