# SPDX-License-Identifier: Apache-2.0
"""Compares the conditions of a profile's measurements with those of this process."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import CONFIG_FILE, Settings, config_files
from ..config.loader import MEASURED
from ..config.yaml_file import read_mapping
from ..device import Device
from ..utils.packages import source_hash
from .facts import versions

logger = logging.getLogger("sglang_fl")

#: Packages whose version affects all entries. For the kernels' packages the source itself is compared.
_EVERY_ENTRY = ("torch", "triton", "sglang")
_KERNELS = ("flag_gems",)
#: Keys of a model's configuration that decide the sizes of kernels' inputs.
_SHAPE = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "n_routed_experts", "num_local_experts", "vocab_size"),
)
_SHOWN = 12


@dataclass(frozen=True)
class Change:
    """A condition that has changed since the measurement.

    Attributes:
        entries: the names of the profile's entries that it affects.
    """

    what: str
    then: str
    now: str
    entries: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.entries[:_SHOWN]) + (f", … ({len(self.entries)} in all)" if len(self.entries) > _SHOWN else "")
        return f"{self.what} was {self.then} and is {self.now}{': ' if shown else ''}{shown}"


def conditions_of(model: Any, chip: str, ranks: int) -> dict[str, Any]:
    """The conditions of measurements in this process.

    Args:
        model: the configuration of its model, from the transformers package, or None.
        ranks: how many ranks share a layer.
    """
    shape = {name: found for name in _SHAPE if isinstance(found := getattr(model, name, None), int)}
    names = getattr(model, "architectures", None) or ["none"]
    return {
        "chip": chip,
        "driver": driver(),
        "versions": {name: found for name, found in versions().items() if name in (*_EVERY_ENTRY, *_KERNELS) and found is not None},
        "model": " ".join([str(names[0]), *(f"{name}={value}" for name, value in shape.items())]),
        "tp": ranks,
    }


def changes(measured: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The conditions in a profile's ``measured`` that have changed, also those that affect none of its entries."""
    then, entries = measured.get("with", {}), measured.get("entries", {})
    every = tuple(entries)
    found = [
        Change(what, str(then.get(what)), str(now[what]), every)
        for what in ("chip", "driver", "model", "tp")
        if what in then and then[what] != now[what]  # the profile of a chip is for any model
    ]
    for name in (*_EVERY_ENTRY, *_KERNELS):
        was, is_now = (some.get("versions", {}).get(name) for some in (then, now))
        if was != is_now:
            touched = every if name in _EVERY_ENTRY else tuple(_of_package(entries, name))
            found.append(Change(name, str(was or "not installed"), str(is_now or "not installed"), touched))
    for package, was in then.get("sources", {}).items():
        is_now = source_hash(package)
        if was != is_now and package not in {change.what for change in found}:
            found.append(Change(f"the source of {package}", was, is_now, tuple(_of_package(entries, package))))
    return found


def _of_package(entries: Mapping[str, Any], package: str) -> Iterator[str]:
    yield from (name for name, entry in entries.items() if package in entry.get("packages", ()))


def measured_in(path: Path) -> Mapping[str, Any] | None:
    """The value of ``measured`` in a file, or None. Raises SettingsError for a file that cannot be read."""
    entry = read_mapping(path, what=CONFIG_FILE, problems=[]).get(MEASURED)
    return entry.value if entry is not None and isinstance(entry.value, dict) else None


def warn_of_changes(settings: Settings, now: Callable[[], Mapping[str, Any]]) -> None:
    """Log the entries of the profiles in use that were measured under other conditions. These are computed only if needed.

    Of a platform's profile only what it does not leave to SGLang.
    """
    for name in (*config_files(os.environ), settings.profile_file):
        path = Path(name).expanduser() if name else None
        measured = measured_in(path) if path else None
        if measured and name == settings.profile_file:
            measured = {**measured, "entries": {name: entry for name, entry in measured.get("entries", {}).items() if _is_used(entry)}}
        if not measured or not measured.get("entries"):
            continue  # nothing that a change could touch
        found = [change for change in changes(measured, now()) if change.entries]
        if found:
            lines = "".join(f"\n  {change}" for change in found)
            again = "tune its models again, and sglang-fl tune --merge" if "models" in measured else f"sglang-fl tune --update {path} MODEL"
            logger.warning("sglang-fl: %s was measured under other conditions; these entries may not hold (%s):%s", path, again, lines)


def _is_used(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("impl", "sglang") != "sglang" or entry.get("status") == "used")


def chip_name(device: Device) -> str:
    """What the first chip calls itself."""
    name = getattr(torch.get_device_module(device.device_type), "get_device_name", None)
    return str(name(0)) if name is not None else device.device_type


def driver() -> str:
    """The version of the accelerator's driver, if it can be read."""
    if not torch.cuda.is_available():
        return "none"
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # another vendor's chip, or NVIDIA's tools are missing
        return f"unknown ({type(error).__name__})"
    return version.decode() if isinstance(version, bytes) else str(version)
