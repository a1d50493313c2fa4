# SPDX-License-Identifier: Apache-2.0
"""Runs in an engine's model processes: switches choices, records calls, times candidates.

It is named in SGLANG_FL_PLUGIN_MODULES and adds a method to SGLang's scheduler, which ``Engine.collective_rpc`` calls on all ranks.
"""

import functools
import gc
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import startup
from ..aten import in_force, why_off
from ..aten.operators import available_functions, unlisted
from ..bind import bind_model, process_binder
from ..compat import refuse, tune_problems
from ..config.settings import FILE, Source
from ..device import Device
from ..dispatch.bridge.layer import LayerSocket
from ..dispatch.bridge.report import BindReport
from ..dispatch.bridge.socket import Socket
from ..dispatch.manager import get_default_manager
from ..dispatch.registry import OpRegistry
from ..dispatch.types import BackendImplKind, OpImpl
from ..distributed.ranks import tensor_parallel_ranks
from ..fingerprint.measured import chip_name, conditions_of
from ..model_run.graphs import DECODE, PREFILL, captured_of
from ..utils.packages import package_of
from . import aten_case
from .aten_calls import Recorder, describe, heaviest, nbytes, telling
from .layer_calls import LayerRecorder, RecordedCall, identity_of
from .timing import Candidate, compare, input_sets

logger = logging.getLogger("sglang_fl")

#: The method's name.
METHOD = "sglang_fl_tune"
#: At most this many calls of an ATen operator are tried: of those in the measured cases, and of the others.
_MOST_CALLS, _MOST_OTHERS = 8, 2
_SOURCE = Source(FILE, "sglang-fl tune")


def tell_apart(rows: Sequence[tuple[dict[str, Any], str]], what: str) -> None:
    """Mark calls of the same text. What is measured is kept under a call's text, also for later engines, and each call has its own times.

    Args:
        rows: of each call also all that makes it another call, such as strides.
        what: the key of a row that names what is called.
    """
    texts = Counter((row[what], row["call"]) for row, _ in rows)
    for row, identity in rows:
        if texts[row[what], row["call"]] > 1:
            row["call"] += f" #{hashlib.sha256(identity.encode()).hexdigest()[:6]}"


def register_builtins(registry: OpRegistry) -> None:
    """Registers no implementation, but adds the method to the scheduler's class."""
    scheduler = getattr(sys.modules.get("sglang.srt.managers.scheduler"), "Scheduler", None)
    if scheduler is not None:
        setattr(scheduler, METHOD, run)


def run(scheduler: Any, command: str, answer: str) -> None:
    """Run a command on this rank. The first rank writes the result to the file ``answer``, as JSON."""
    live: Live | None = getattr(scheduler, "sglang_fl_live", None)
    if live is None:
        live = scheduler.sglang_fl_live = Live(scheduler)
    asked = json.loads(command)
    found = getattr(live, asked.pop("do"))(**asked)
    if live.rank == 0:
        Path(answer).write_text(json.dumps(found), encoding="utf-8")


class Live:
    """The commands."""

    def __init__(self, scheduler: Any):
        from sglang.srt.platforms import current_platform

        refuse(tune_problems())
        # On a CPU SGLang collects garbage whenever it flushes its cache, in half a second with all that was imported.
        gc.collect()
        gc.freeze()
        self._scheduler, self._runner = scheduler, scheduler.tp_worker.model_runner
        self._platform: Any = current_platform
        self._device: Device = self._platform.device
        self._on = torch.device(self._device.device_type)
        self._settings = startup.settings_in_worker(self._device)
        self._ranks = tensor_parallel_ranks()
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        #: phase -> whether SGLang replays graphs in it
        self._graphs = {phase: phase in captured_of(self._runner) for phase in (PREFILL, DECODE)}
        self._layers: list[RecordedCall] = []
        self._functions: list[dict[str, Any]] = []

    @property
    def _captures(self) -> bool:
        return any(self._graphs.values())

    def describe(self) -> dict[str, Any]:
        """The available implementations, and the conditions here."""
        off = why_off(replace(unlisted(self._settings), use_flaggems=True), self._device, captures_graphs=self._captures)
        return {
            "conditions": conditions_of(getattr(self._runner.model, "config", None), chip_name(self._device), self._ranks.count),
            "vocabulary": int(self._runner.model_config.vocab_size),
            "longest": int(self._runner.model_config.context_len),
            "plain_cpu": self._device.device_type == "cpu" and not self._device.is_in_tree,
            "graphs": self._graphs,
            "draft": getattr(self._scheduler, "draft_worker", None) is not None,
            "functions_off": off,
            "scope": self._settings.flagos_scope if self._captures else "everywhere",
            "implementations": {op: _implementations(op) for op in sorted({socket.op for socket in _sockets()})},
        }

    def use(self, orders: Mapping[str, Sequence[str]], functions: Sequence[str]) -> dict[str, Any]:
        """Use these orders and FlagGems functions from the next step on. Graphs are captured again.

        Returns:
            the binding of each operator, and the replaced functions.
        """
        report = self._bind(orders, functions)
        if self._captures:
            self._scheduler.tp_worker.init_cuda_graphs()
        return _found([*((op, to) for op, _, to in report.layers), *((op, to) for (op, _), to in report.functions.items())])

    def in_force(self) -> dict[str, Any]:
        """The same of a choice that the engine was started with; operators that SGLang computes are not in it."""
        return _found([(socket.op, f"({impl.impl_id})") for socket, impl in process_binder().bound().items()])

    def _bind(self, orders: Mapping[str, Sequence[str]], functions: Sequence[str]) -> BindReport:
        chosen = tuple((op, tuple(order)) for op, order in orders.items())
        sources = {**self._settings.sources, "op_backends": _SOURCE, "flagos_whitelist": _SOURCE}
        settings = replace(
            self._settings,
            op_backends=chosen,
            flagos_whitelist=tuple(functions),
            flagos_blacklist=None,
            use_flaggems=True,
            sources=sources,
            order_sources=dict.fromkeys(orders, _SOURCE),
        )
        _forget_seeds()
        startup.apply(settings, self._device)
        return bind_model(self._runner.model, self._device)

    def record(self) -> dict[str, Any]:
        """Start recording. Graphs are set aside, so that each step's calls are seen."""
        model = self._runner.model
        self._passes: dict[str, int] = {}
        self._shown = ("", 0)
        self._layer_recorder = LayerRecorder(_sockets())
        self._recorder = Recorder(self._device.device_type)
        self._set_aside = (self._runner.decode_cuda_graph_runner, self._runner.prefill_cuda_graph_runner)
        if self._captures:
            self._runner.decode_cuda_graph_runner = self._runner.prefill_cuda_graph_runner = None
        self._layer_recorder.start()
        self._recorder.start()
        self._forward = vars(model).get("forward")
        model.forward = functools.partial(self._labelled, model.forward)
        return {}

    def label(self, phase: str, batch: int) -> dict[str, Any]:
        """What is computed from now on, until the next one: a batch's prefill, in one pass or several, or its decode steps."""
        self._shown = (phase, batch)
        return {}

    def _labelled(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap the model's forward, so that calls get the label of their step."""
        batch = next(value for value in (*args, *kwargs.values()) if hasattr(value, "forward_mode"))
        phase, (shown, size) = "decode" if batch.forward_mode.is_decode() else "prefill", self._shown
        if phase == shown == "prefill":  # all passes together are the one that is measured
            label = f"prefill/{size}"
            self._passes[label] = 1
        else:
            label = f"decode/{size}" if phase == shown and batch.batch_size == size else f"{phase}/traffic"
            self._passes[label] = self._passes.get(label, 0) + 1
        self._layer_recorder.label = self._recorder.label = label
        try:
            return forward(*args, **kwargs)
        finally:
            self._recorder.label = f"{label} outside"

    def recorded(self, directory: str | None, labels: Sequence[str]) -> dict[str, Any]:
        """End recording.

        Args:
            directory: where calls of layers are saved for the checking process. None: they are not.
            labels: the measured cases; their calls come first.

        Returns:
            ``passes``: step -> how often it ran. ``layers`` and ``functions``: the calls to try, by number, with their counts per pass.
        """
        if self._forward is None:
            del self._runner.model.forward
        else:
            self._runner.model.forward = self._forward
        self._recorder.stop()
        self._runner.decode_cuda_graph_runner, self._runner.prefill_cuda_graph_runner = self._set_aside
        _forget_seeds()
        bind_model(self._runner.model, self._device)  # the recording forwards are removed
        self._layers = list(self._layer_recorder.calls.values())
        layers, functions = [self._layer_row(number, directory) for number in range(len(self._layers))], self._function_rows(labels)
        tell_apart(list(zip(layers, map(identity_of, self._layer_recorder.calls), strict=True)), "class")
        tell_apart([(row, json.dumps([row["args"], row["kwargs"]])) for row in functions], "key")
        return {"passes": self._passes, "layers": layers, "functions": functions}

    def _layer_row(self, number: int, directory: str | None) -> dict[str, Any]:
        call = self._layers[number]
        file = None if directory is None else self._saved(call, Path(directory) / f"{call.socket.op}-{number}.call")
        dtype = str(call.socket.dtype).removeprefix("torch.")
        row = {"number": number, "op": call.socket.op, "class": call.socket.name, "call": call.describe(), "dtype": dtype}
        return {**row, "per_pass": self._per_pass(call.counts), "bytes": call.nbytes, "file": file}

    def _saved(self, call: RecordedCall, file: Path) -> str | None:
        try:
            written = call.pickled()
        except Exception as error:  # whatever a layer keeps
            logger.info("a call of %s cannot be saved: %s: %s", call.socket.op, type(error).__name__, error)
            return None
        if self.rank == 0:
            file.write_bytes(written)
        return str(file)

    def _per_pass(self, counts: Mapping[str, int]) -> dict[str, float]:
        """The number of calls per pass. Calls between passes count for the previous one."""
        passes = {label: self._passes.get(label.removesuffix(" outside")) for label in counts}
        return {label: count / of for label, count in counts.items() if (of := passes[label])}

    def _function_rows(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The calls of ATen operators with a FlagGems function."""
        self._pairs: dict[str, list[tuple[str, Any]]] = {}
        self._dispatch_key = ""
        off = self.describe()["functions_off"]
        if off is None:
            rows, self._dispatch_key = available_functions(self._settings)
            for key, fn in rows:
                self._pairs.setdefault(fn.__name__, []).append((key, fn))
        function_of = {key: name for name, rows in self._pairs.items() for key, _ in rows}
        by_key: dict[str, list[dict[str, Any]]] = {}
        for call in self._recorder.calls():
            by_key.setdefault(call["key"], []).append(call)
        found: list[dict[str, Any]] = []
        for key, calls in sorted(by_key.items()):
            others = [call for call in calls if not call["counts"].keys() & set(labels)]
            for each in [*heaviest(calls, labels, _MOST_CALLS), *telling(others, _MOST_OTHERS)]:
                row = {"key": key, "args": each["args"], "kwargs": each["kwargs"], "call": describe(each["args"], each["kwargs"])}
                row["bytes"] = nbytes([each["args"], each["kwargs"]])
                found.append({**row, "number": len(found), "function": function_of.get(key), "per_pass": self._per_pass(each["counts"])})
        self._functions = found
        return found

    def time_layer(self, number: int, impl: str, rounds: int) -> dict[str, Any]:
        """Time SGLang's own forward and the implementation on a recorded call, see :class:`~sglang_fl.tune.timing.Timing`."""
        call, binder = self._layers[number], process_binder()
        implementation = get_default_manager().registry.get_implementation(call.socket.op, impl)
        assert implementation is not None
        forwards = {"own": call.socket.own, "theirs": binder.direct_forward(call.socket, implementation)}

        def times() -> dict[str, Any]:
            sets = input_sets(call.nbytes, self._on)
            candidates = {name: Candidate(call.calls(forward, sets, self._on)) for name, forward in forwards.items()}
            return {name: asdict(timing) for name, timing in compare(candidates, self._on, rounds).items()}

        return if_memory_suffices(times)

    def time_function(self, number: int, rounds: int) -> dict[str, Any]:
        """Time PyTorch's own kernel and FlagGems's function on a recorded call."""
        row = self._functions[number]
        case = aten_case.Case(row["key"], row["args"], row["kwargs"], self._pairs[row["function"]], self._dispatch_key)
        return if_memory_suffices(functools.partial(aten_case.time, case, self._on, graphs=True, rounds=rounds))


def if_memory_suffices(times: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The times, or an ``error`` if the inputs are too large for the memory that the server leaves free. The engine can go on."""
    try:
        with torch.inference_mode():
            return times()
    except torch.OutOfMemoryError as error:
        logger.info("tune: %s", error)
        return {"error": "its inputs need more device memory than the server leaves free; lower --mem-fraction-static"}


def _sockets() -> list[Socket]:
    """The sockets of layers and functions. Kernels are bound before the model; their arguments are unknown."""
    return [socket for socket in process_binder().sockets() if socket.is_tried]


def _forget_seeds() -> None:
    """Reset layers that ran their own forward: they keep it, and would look pinned by SGLang."""
    for socket in _sockets():
        if isinstance(socket, LayerSocket) and getattr(socket.subject._forward_method, "__func__", None) is socket.own:
            socket.subject._forward_method = None


def _implementations(op: str) -> list[dict[str, Any]]:
    """An operator's implementations, with the reason for those that cannot run here."""
    found: list[OpImpl] = sorted(get_default_manager().registry.get_implementations(op), key=lambda impl: (-impl.priority, impl.impl_id))
    return [{"impl": impl.impl_id, "packages": _packages(impl), "why_not": impl.why_unavailable()} for impl in found]


def _packages(impl: OpImpl) -> list[str]:
    """The packages whose source decides what an implementation computes."""
    return [package_of(impl.module), *(["flag_gems"] if impl.kind is BackendImplKind.DEFAULT else [])]


def _found(destinations: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The bindings of each operator, and the replaced functions."""
    bound: dict[str, set[str]] = {}
    for op, destination in destinations:
        bound.setdefault(op, set()).add(destination)
    operators = in_force()
    replaced = [] if operators is None else sorted({function for _, function in operators.report.replaced})
    return {"bound": {op: sorted(to) for op, to in bound.items()}, "functions": replaced}
