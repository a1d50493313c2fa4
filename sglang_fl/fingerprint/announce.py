# SPDX-License-Identifier: Apache-2.0
"""A server says what it runs: one line in its log, and one metric in SGLang's own Prometheus output."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..aten import AtenReport
from ..compat import metrics_problems
from ..config import Settings
from ..device import Device
from ..dispatch.bridge.report import BindReport
from ..dispatch.kernel_implementations import is_kernel
from .compare import MARK, STARTED
from .facts import fingerprint, machine_facts

logger = logging.getLogger("sglang_fl")

METRIC = "sglang_fl_info"
_LABELS = ("fingerprint", "model", "sglang_fl", "sglang", "chip", "profile", "bindings", "aten_functions", "left_out")
_gauge: Any = None
#: When this process loaded sglang-fl. In a log, it tells one start's lines from another's.
_started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
#: A model's name -> the labels of its current sample.
_samples: dict[str, Any] = {}


def announce(facts: dict[str, Any], log_level: int) -> str:
    """Log the fingerprint of a model that was just bound, or whose functions changed, and set the metric if the server runs with
    ``--enable-metrics``.

    Args:
        facts: what :func:`server_facts` returns.
        log_level: the level of the line. Every process of the model sets the metric; equal ones show as one.

    Returns:
        the fingerprint.
    """
    mark = fingerprint(facts)
    logger.log(log_level, "%s%s of %s: %s", MARK, mark, facts["model"], json.dumps({STARTED: _started, **facts}))
    if _metrics_are_on():
        _set_metric(mark, facts)
    return mark


def server_facts(
    model: str,
    settings: Settings,
    device: Device,
    bound: BindReport,
    replaced: AtenReport,
    kernels: Mapping[str, Sequence[str]] = MappingProxyType({}),
    excluded: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a server runs, in the shape of ``sglang-fl ops --json``.

    Args:
        model: the name of its class; of a draft model with `` (draft)`` after it.
        kernels: implementation -> the kernels outside of SGLang's layers that run on it.
        excluded: what ended an earlier start -> what happened.
    """
    destinations: dict[str, set[str]] = {}
    for op, _, destination in bound.layers:
        destinations.setdefault(op, set()).add(destination)
    for (op, _), destination in bound.functions.items():
        destinations.setdefault(op, set()).add(destination)
    destinations |= {kernel: {destination} for destination, names in kernels.items() for kernel in names}
    left_out = {function: reason for _, function, reason in replaced.left if settings.flagos_exclusion_reason(function) is None}
    left_out |= {name: reason for name, reason in excluded.items() if name.partition(": ")[0] in destinations}
    return {
        "model": model,
        **machine_facts(settings, device),
        "operators": [{"op": op, "picked": "; ".join(sorted(to)), "runs_on": sorted(to)} for op, to in sorted(destinations.items())],
        "aten_functions": sorted({function for _, function in replaced.replaced}),
        "aten_scope": "graphs" if replaced.in_graphs else "everywhere",
        # What the settings select, and what is nevertheless left to PyTorch.
        "left_out": left_out,
    }


def _metrics_are_on() -> bool:
    if problems := metrics_problems():
        logger.info("sglang-fl sets no metric: %s", "; ".join(problems))
        return False
    from sglang.srt.runtime_context import get_observability

    try:
        return bool(get_observability().enable_metrics)
    except ValueError:  # outside of a server
        return False


def _set_metric(mark: str, facts: dict[str, Any]) -> None:
    global _gauge
    if _gauge is None:
        from prometheus_client import Gauge  # after SGLang has named the directory that processes share

        _gauge = Gauge(METRIC, "1: what sglang-fl runs in this server; 0: what it ran before", _LABELS, multiprocess_mode="mostrecent")
    model = facts["model"]
    if model in _samples:
        _samples[model].set(0)
    _samples[model] = _gauge.labels(
        fingerprint=mark,
        model=model,
        sglang_fl=facts["versions"]["sglang-fl"],
        sglang=facts["versions"]["sglang"],
        chip=f"{facts['device']} ({facts['evidence']})",
        profile=facts["profile"],
        bindings=", ".join(f"{row['op']}={row['picked']}" for row in facts["operators"] if not is_kernel(row["op"])),
        aten_functions=len(facts["aten_functions"]),
        left_out=", ".join(sorted(facts["left_out"])),
    )
    _samples[model].set(1)
