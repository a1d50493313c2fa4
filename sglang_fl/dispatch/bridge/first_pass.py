# SPDX-License-Identifier: Apache-2.0
"""Which bound layers a model calls at all.

SGLang fuses past some layers on some devices: another kernel does their work, and their forward never
runs, whatever it is bound to. A model that has run once as a whole shows which.
"""

import re
import weakref
from collections import defaultdict

from torch import nn

from ..logger_manager import dispatch_log, get_logger

logger = get_logger()


class FirstPass:
    """A model's first pass: the layers that it has not called yet."""

    def __init__(self, log_level: int):
        self._log_level = log_level
        self._waiting: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._has_lead = False
        self._is_over = False

    def expect(self, layer: nn.Module, name: str) -> None:
        """A bound layer that a pass should call, with its name in the model."""
        self._waiting[layer] = name

    def called(self, layer: nn.Module, *, shared: bool) -> bool:
        """A layer is called.

        Args:
            shared: one pass may call it several times.

        Returns:
            Whether its next call begins a second pass: it is the first that was called, of those that a
            pass calls once.
        """
        self._waiting.pop(layer, None)
        if self._has_lead or shared:
            return False
        self._has_lead = True
        return True

    def over(self) -> None:
        """The pass is over: say which layers it did not call."""
        if self._is_over:
            return
        self._is_over = True
        places: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for layer, name in self._waiting.items():
            places[type(layer).__name__][re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] += 1
        self._waiting.clear()
        for class_name, names in sorted(places.items()):
            where = " ".join(sorted(names))
            count = sum(names.values())
            logger.log(
                self._log_level,
                "sglang-fl: SGLang runs the model past %d bound %s %s, so that other kernels do their work (or, as in a vision "
                "tower, nothing had to be done yet): %s",
                count,
                class_name,
                "layer" if count == 1 else "layers",
                where,
            )
            dispatch_log().record(class_name, f"sglang(never called: {where})")
