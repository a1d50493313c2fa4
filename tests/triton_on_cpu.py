# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on a CPU, by Triton's own interpreter (``TRITON_INTERPRET=1``), where they would not run as they come.

What is changed is the interpreter and what asks for a device, never a kernel:

- ``tl.exp`` and its like can be called under another name, as flash-linear-attention's files do;
- matrix products of bf16 are products of numbers, not of their bits;
- numbers are rounded to bf16, as devices do, not cut off;
- a kernel that is tuned takes its first configuration: there is no device to time the others on;
- FlagGems's decorators of kernels hand them on, and its kernels are imported without the package, which wants a device.

``python tests/triton_on_cpu.py NAME`` holds an implementation of the gated delta rule (``cuda`` or ``flaggems``) against
float64, in fp16, and prints JSON: on ``CASES``, or with ``--all`` on all
cases of ``sglang-fl check --quick``.
"""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

CHUNK, PACKED = OPERATORS = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule_packed_decode")
#: Calls in which layouts, slots and the borders of chunks show. The interpreter takes a quarter of a second for a head of a chunk.
CASES = {
    CHUNK: """
    lengths=64,65 value_heads=2 | lengths=0,0,0 | tokens=67 rows=2 | value_heads=3 | heads=2 value_heads=2 | key_dim=48 value_dim=80
    | no_norm scale=0.3 | size=0.000244140625 | layout=packed value_heads=2 | slots=-1,2,-1 | slots=-1,-1,-1 | slots=3,3,3 read_only
    | pool={ordered,none,view} | sequences=17
    """,
    PACKED: """
    value_heads=8 | heads=2 value_heads=4 | key_dim=48 value_dim=80 | no_norm | size=0.000244140625 | layout=packed value_heads=2
    | slots=-1,3,-1,0,-1 | slots=-1,-1 | pool=view | tokens=0
    """,
}


def interpret() -> None:
    """Have Triton kernels interpreted in this process; before anything imports one."""
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    tuned = triton.autotune

    def first_configuration(configs: Any, *args: Any, **options: Any) -> Any:
        return tuned(list(configs)[:1], *args, **options)

    triton.autotune = first_configuration
    for module in (tl, tl.math):
        for name in ("exp", "exp2", "log", "log2"):
            setattr(module, name, _under_any_name(getattr(module, name), name))
    torch.cpu.device = lambda index=None: contextlib.nullcontext()  # type: ignore[attr-defined]
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]

    dot = interpreter.InterpreterBuilder.create_dot

    def as_numbers(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, as_numbers(a), as_numbers(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot

    convert = interpreter._convert_float

    def convert_float(x: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        if (from_type, to_type) != (tl.float32, tl.bfloat16):
            return convert(x, from_type, to_type, rounding)
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert_float


def _under_any_name(own: Any, name: str) -> Any:
    import triton.language as tl
    from triton.runtime import interpreter

    def builtin(*args: Any, _semantic: Any = None, **options: Any) -> Any:
        return own(*args, _semantic=_semantic or interpreter.interpreter_semantic, **options)

    builtin.__name__ = name
    setattr(builtin, tl.core.TRITON_BUILTIN, True)
    return builtin


def cuda() -> ModuleType:
    """``vendor/cuda/impl/gated_delta_rule.py``, on SGLang's own kernels."""
    return importlib.import_module("sglang_fl.dispatch.backends.vendor.cuda.impl.gated_delta_rule")


def flaggems() -> ModuleType:
    """``flaggems/impl/gated_delta_rule.py``, on FlagGems's own kernels."""
    import triton

    spec = importlib.util.find_spec("flag_gems")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for name in ("flag_gems", "flag_gems.fused", "flag_gems.utils"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    utils, runtime = sys.modules["flag_gems.utils"], ModuleType("flag_gems.runtime")
    utils.libentry = lambda: lambda kernel: kernel  # type: ignore[attr-defined]
    utils.libtuner = lambda configs, key, **options: triton.autotune(configs, key=[])  # type: ignore[attr-defined]
    info = sys.modules["flag_gems.utils.device_info"] = ModuleType("flag_gems.utils.device_info")
    info.get_device_capability = lambda: (9, 0)  # type: ignore[attr-defined]
    info.get_device_properties = lambda: None  # type: ignore[attr-defined]
    runtime.device = type("device", (), {"vendor_name": "nvidia"})  # type: ignore[attr-defined]
    runtime.torch_device_fn = type("fn", (), {"device": staticmethod(lambda index: contextlib.nullcontext())})  # type: ignore[attr-defined]
    sys.modules["flag_gems"].runtime = sys.modules["flag_gems.runtime"] = runtime  # type: ignore[attr-defined]

    from sglang_fl.dispatch.backends.flaggems import library

    library.load = lambda: sys.modules["flag_gems"]  # type: ignore[assignment]
    return importlib.import_module("sglang_fl.dispatch.backends.flaggems.impl.gated_delta_rule")


def main(name: str, everything: bool) -> None:
    interpret()
    import torch

    from sglang_fl.check.cases import OPERATORS_CHECKED, Case, cases_of
    from sglang_fl.check.cases.call import rows_of
    from sglang_fl.check.check_case import check_case
    from sglang_fl.check.constants import INPUTS, SERVING, SPECIAL, UNUSUAL
    from sglang_fl.check.implementation import Implementation

    implementation = {"cuda": cuda, "flaggems": flaggems}[name]()
    cpu, found = torch.device("cpu"), []
    for op in OPERATORS:
        impl = Implementation(op, getattr(implementation, op), None, cpu)
        form = OPERATORS_CHECKED[op].form.of("heads=1 value_heads=1")
        cases = [Case(op, UNUSUAL, words, "float16", form.of(words)) for words in rows_of(CASES[op])]
        if everything:
            every = cases_of(op, frozenset({torch.float16}), cpu, quick=True)
            cases = [case for case in every if case.check in (SERVING, UNUSUAL, SPECIAL, INPUTS)]
        for case in cases:
            outcome = check_case(impl, case, 11)
            used = outcome.error_ulp / outcome.bound_ulp if outcome.error_ulp is not None and outcome.bound_ulp else None
            found.append([op, case.check, case.name, outcome.status, outcome.message, used])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
