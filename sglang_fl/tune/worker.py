# SPDX-License-Identifier: Apache-2.0
"""The process that checks candidates on recorded calls, a ``check.process.Process``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..aten.operators import available_functions
from ..check.check_case import check_case
from ..check.constants import COMPILING, FAILED, OK, RUNNING, SKIPPED
from ..check.implementation import Implementation
from ..check.worker import serve
from ..config import load_settings
from ..device import detect
from ..dispatch.manager import get_default_manager
from .aten_case import Case as FunctionCase
from .aten_case import check as check_function
from .recorded import cases_of_check, cases_of_recorded
from .timing import first_error


class Worker:
    """Runs the cases of a file. Each has ``kind``, and either ``op``, ``impl`` and ``file``, or ``function`` and an ATen call."""

    def __init__(self, file: str, send: Callable[[Any], None]):
        self._cases, self._send = json.loads(Path(file).read_text(encoding="utf-8")), send
        found = detect()
        self._device = torch.device(found.device_type)
        get_default_manager().ensure_initialized()
        self._functions: dict[str, list[tuple[str, Any]]] = {}
        self._dispatch_key = ""
        if any(case["kind"] == "function" for case in self._cases):
            rows, self._dispatch_key = available_functions(load_settings(device=found))
            for key, fn in rows:
                self._functions.setdefault(fn.__name__, []).append((key, fn))

    def hello(self) -> dict[str, Any]:
        return {}

    def run(self, number: int) -> dict[str, Any]:
        """Return ``status``, ``message`` if it is not ok, and ``lost`` if this process cannot continue."""
        case = self._cases[number]
        return self._layer(case) if case["kind"] == "layer" else self._function(case)

    def _layer(self, case: Mapping[str, Any]) -> dict[str, Any]:
        implementation = get_default_manager().registry.get_implementation(case["op"], case["impl"])
        if implementation is None:
            return {"status": FAILED, "message": "it is not registered in the checking process"}
        enter = Implementation(
            case["op"],
            implementation.function,
            None,
            self._device,
            writes_inputs=implementation.writes_inputs,
            enter=self._send,
        )
        if case["file"] is None:
            checks = list(cases_of_check(case["op"], getattr(torch, case["dtype"]), self._device))
        else:
            checks = list(cases_of_recorded(Path(case["file"]).read_bytes(), case["name"], self._device))
        if not checks:
            return {"status": SKIPPED, "message": "sglang-fl check has no exact results for this operator"}
        for number, check in enumerate(checks):
            outcome = check_case(enter, check, number)
            if outcome.status not in (OK, SKIPPED):
                return {"status": outcome.status, "message": f"{check.check}: {outcome.message}"}
        return {"status": OK, "message": ""}

    def _function(self, case: Mapping[str, Any]) -> dict[str, Any]:
        self._send(COMPILING)
        made = FunctionCase(case["key"], case["args"], case["kwargs"], self._functions[case["function"]], self._dispatch_key)
        try:
            with torch.inference_mode():
                found = check_function(made, self._device)
        except Exception as error:  # a case that fails is a result
            found = {"error": first_error(error)}
        finally:
            self._send(RUNNING)
        lost = {"lost": True} if found.get("lost") else {}
        if found.get("error"):
            return {"status": SKIPPED, "message": found["error"]}
        if found["right"] is None:
            return {"status": SKIPPED, "message": found["why"], **lost}
        why = found["why"] if found["right"] is False else found.get("graph_why") if found.get("graph_safe") is False else None
        return {"status": OK if why is None else FAILED, "message": why or "", **lost}


if __name__ == "__main__":
    serve(Worker)
