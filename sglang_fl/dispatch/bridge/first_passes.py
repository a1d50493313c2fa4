# SPDX-License-Identifier: Apache-2.0
"""Finds bound layers that a model never calls.

On some devices SGLang uses a fused kernel in the place of some layers: their forward never runs, whatever it is
bound to. A model that has run a few times as a whole shows which.
"""

import re
import weakref
from collections import defaultdict

from torch import nn

from ..logger_manager import dispatch_log, get_logger

logger = get_logger()

#: How often the layer that was called first is called before the others are judged. More than once, since a pass
#: may be cut into parts that take turns (two-batch overlap).
_PASSES = 8


class FirstPasses:
    """A model's first passes: the bound layers that they have not called yet."""

    def __init__(self, log_level: int):
        self._log_level = log_level
        self._waiting: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._lead: weakref.ref[nn.Module] | None = None
        self._passes = 0
        self._reported: dict[str, str] = {}

    @property
    def over(self) -> bool:
        return self._passes > _PASSES

    def expect(self, layer: nn.Module, name: str) -> None:
        """A bound layer that the model should call, with its name in the model."""
        if not self.over:
            self._waiting[layer] = name

    def called(self, layer: nn.Module, *, shared: bool) -> bool:
        """A layer is called.

        Args:
            shared: one pass may call it several times.

        Returns:
            Whether its next call must be counted, too: passes are counted by this layer.
        """
        self._waiting.pop(layer, None)
        if self.over:
            self._take_back(layer)
            return False
        if self._lead is None and not shared:
            self._lead = weakref.ref(layer)
        if self._lead is None or self._lead() is not layer:
            return False
        self._passes += 1
        if self.over:
            self._report_uncalled()
        return not self.over

    def _report_uncalled(self) -> None:
        """Log which layers were not called."""
        places: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for layer, name in self._waiting.items():
            places[type(layer).__name__][re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] += 1
        self._waiting.clear()
        for class_name, names in sorted(places.items()):
            where = " ".join(sorted(names))
            count = sum(names.values())
            self._reported[class_name] = where
            logger.log(
                self._log_level,
                "sglang-fl: %d bound %s %s never called (SGLang uses fused kernels instead, or that part of the model has not run yet): %s",
                count,
                class_name,
                "layer was" if count == 1 else "layers were",
                where,
            )
            dispatch_log().record(class_name, f"sglang(not called: {where})")

    def _take_back(self, layer: nn.Module) -> None:
        where = self._reported.pop(type(layer).__name__, None)
        if where is not None:
            logger.log(self._log_level, "sglang-fl: a bound %s layer is called after all, one of %s", type(layer).__name__, where)
