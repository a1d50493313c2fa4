# SPDX-License-Identifier: Apache-2.0
"""What files of results must have for a profile to be made from them; what else they have is left alone."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

#: Times and ratios of times. (1e999 is read as infinity.)
Figure = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
#: The median, and the ends of its interval.
Ratio = tuple[Figure, Figure, Figure]


class Gpu(msgspec.Struct):
    gpu: str


class OpRow(msgspec.Struct):
    op: str
    impl: str
    kind: Literal["sglang", "flagos", "triton", "vendor", "reference"]
    hidden: int
    tokens: int
    variant: str | None = None
    ratio: Ratio | None = None
    error: str | None = None


class Ops(msgspec.Struct):
    """``ops.py``'s."""

    machine: Gpu
    versions: dict[str, str]
    date: str
    dtype: str
    rows: list[OpRow]
    note: str | None = None


class AtenRow(msgspec.Struct):
    key: str
    function: str
    call: str
    seen_eager: int
    seen_captured: int
    right: bool | None = None
    why: str | None = None
    error: str | None = None
    graph_safe: bool | None = None
    graph_why: str | None = None
    ratio: Ratio | None = None
    host_ratio: Ratio | None = None


class Aten(msgspec.Struct):
    """What FlagGems's ATen functions were measured as, on recorded calls."""

    machine: Gpu
    versions: dict[str, str]
    date: str
    models: list[str]
    rows: list[AtenRow]
    note: str | None = None


class Device(msgspec.Struct):
    device: str | None


class Speed(msgspec.Struct):
    case: str
    variant: str
    ratio: Figure | None = None
    low: Figure | None = None
    high: Figure | None = None


class Served(msgspec.Struct):
    """A run of ``serving.py``."""

    model: str
    machine: Device
    versions: dict[str, str]
    baseline: str
    variants: dict[str, dict[str, Any]]
    dispatched: dict[str, list[str]]
    rounds: list[Any]
    summary: list[Speed]


def check(where: Path | str, found: Any, kind: type[msgspec.Struct]) -> None:
    """Raises ValueError, naming the place, if something is missing or is no such thing."""
    try:
        msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}") from None
