# SPDX-License-Identifier: Apache-2.0
"""This package's Triton kernels in Triton's interpreter, against float64; what they are registered as."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.cases.call import Draw
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import SPECIAL, UNUSUAL
from sglang_fl.check.implementation import Implementation
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch.backends.triton.triton import BACKEND
from sglang_fl.dispatch.types import match_token

TESTS = Path(__file__).parents[2]
OPERATORS = sorted(BACKEND.kernels)
EXPERTS = {"EXPERTS": 128, "BINS": 256}
PRODUCT = {"EXPERTS": 128, "TOP_K": 8, "N": 1536, "K": 2048, "GROUP": 16, "ACTIVATION": "silu", "GATED": True}


@pytest.mark.parametrize(("vendor", "available"), [("nvidia", True), ("ascend", True), ("cpu", False)])
def test_where_they_are_available(vendor: str, available: bool) -> None:
    for impl in BACKEND.implementations():
        why = impl.why_unavailable(Settings(), Device(vendor, "cuda", None, "a test"))
        assert (why is None) == available, why
        assert match_token(impl, "triton") and match_token(impl, "impl:triton.sglang_fl") and not match_token(impl, "flagos")


def test_they_do_not_need_flaggems() -> None:
    impl = BACKEND.implementations()[0]
    assert impl.why_unavailable(Settings(use_flaggems=False), Device("nvidia", "cuda", None, "a test")) is None


def test_the_kernels_in_the_interpreter() -> None:
    """All unusual and special cases of a quick check; rows too long for registers are every row here the second time."""
    command = [sys.executable, "-W", "ignore", __file__]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    found = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert found.returncode == 0, found.stderr[-3000:]
    counts, wrong = json.loads(found.stdout.splitlines()[-1])
    assert wrong == []
    assert sorted(counts) == OPERATORS and min(counts.values()) > 10


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize(
    ("kernel", "pointers", "given"),
    [
        ("activation:activation_kernel", "x out", {"NAME": "silu", "SIZE": 512, "ROWS": 1, "BLOCK": 512}),
        ("normalization:norm_kernel", "x residual weight out", {"SIZE": 512, "PLUS_ONE": False, "ROWS": 2, "BLOCK": 512}),
        ("normalization:norm_kernel", "x residual weight out", {"SIZE": 512, "PLUS_ONE": False, "ROWS": 1, "BLOCK": 256}),
        (
            "rotary:rotary_kernel",
            "query key cos sin positions query_out key_out",
            {"QUERY_HEADS": 4, "KEY_HEADS": 2, "HEAD_DIM": 64, "HALF": 24, "INTERLEAVED": False, "ROWS": 8, "BLOCK": 32, "REST": 16}
            | dict.fromkeys(("TIME", "HEIGHT", "WIDTH", "MIXED")),
        ),
        (
            "gated_delta_rule:packed_decode_kernel",
            "mixed a b A_log dt_bias pool out",
            {"HEADS": 2, "VALUE_HEADS": 4, "KEY_DIM": 64, "VALUE_DIM": 64, "NORMED": True, "ROWS": 16, "BLOCK": 64},
        ),
        ("moe:count_kernel", "", {**EXPERTS, "CHUNK": 256}),
        ("moe:align_kernel", "", {**EXPERTS, "CHUNK": 256, "BLOCK": 16, "PARTS": 16, "counts": None}),
        ("moe:align_kernel", "", {**EXPERTS, "CHUNK": 4096, "BLOCK": 128, "PARTS": 16}),
        (
            "moe:product_kernel",
            "x weight bias out",
            {**PRODUCT, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "total": None, "order": None},
        ),
        (
            "moe:product_kernel",
            "x weight bias out",
            {**PRODUCT, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "ACTIVATION": None, "GATED": False},
        ),
        ("moe:sum_kernel", "x out", {"EXPERTS": 128, "TOP_K": 8, "SIZE": 512, "BLOCK": 512}),
    ],
)
def test_memory_is_touched_once_the_kernel_before_has_ended(kernel: str, pointers: str, given: dict[str, Any], overlaps: bool) -> None:
    """Compiled for Hopper, which needs no GPU: where kernels may overlap, nothing is loaded or stored before the wait."""
    import triton  # not above: this file is run as a script too, in which Triton's interpreter is chosen before
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.partition(":")
    function = getattr(importlib.import_module(f"sglang_fl.dispatch.backends.triton.kernels.{module}"), name)
    constants = {**given, "OVERLAPS": overlaps}
    types = dict.fromkeys(pointers.split(), "*bf16") | {"positions": "*i64", "slots": "*i64", "eps": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(("ids", "counts", "total", "order", "experts"), "*i32") | {"factors": "*fp32"}
    signature = {argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(argument),): value for argument, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    order = [found[0] for found in re.finditer(r"griddepcontrol\.\w+|(?:ld|st)\.global", code)]
    asked = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"] if overlaps else []
    assert order[: len(asked)] == asked and {"ld.global", "st.global"} == set(order[len(asked) :])


def main() -> None:
    """Prints [operator -> how many cases were run, those that failed]."""
    from triton_on_cpu import interpret

    interpret()
    from sglang_fl.dispatch.backends.triton.impl import moe, normalization

    counts: dict[str, int] = {}
    wrong = []

    def run(op: str, names: tuple[str, ...] = ()) -> None:
        impl = Implementation(op, BACKEND.function(op).load(), None, torch.device("cpu"))
        for case in cases_of(op, frozenset({torch.float16}), torch.device("cpu"), quick=True):
            if case.check in (UNUSUAL, SPECIAL) and (not names or case.name in names):
                outcome = check_case(impl, case, 11)
                counts[op] = counts.get(op, 0) + 1
                if outcome.status != "ok":
                    wrong.append([op, case.check, case.name, outcome.status, outcome.message])

    for op in OPERATORS:
        run(op)
    normalization._LONGEST, normalization._NUMBERS = 64, 1
    normalization.tile.cache_clear()
    run("rms_norm")
    # More routes than are looked at at once, more counts than are read at once, and blocks higher than so few need.
    moe._LEAST_CHUNK, moe._CHUNK, moe._PARTS = 16, 16, 2
    for moe._height in (lambda routes, experts: 16), (lambda routes, experts: 128):
        run("fused_moe", ("unchosen=2 tokens=40", "experts=60 hidden=72 size=40 top_k=6", "bias elsewhere=0.5"))
    # Compiled by Inductor, what is written in place to one of two views would be lost.
    for op in ("rotary_embedding", "mrotary_embedding"):
        call = OPERATORS_CHECKED[op].form(Draw(torch.Generator().manual_seed(1), torch.float16, torch.device("cpu")))
        kept = {name: x.clone() for name, x in call.tensors().items()}
        arguments, named = call.arguments()
        torch.compiler.is_compiling = lambda: True
        compiled = BACKEND.function(op).load()(*arguments, **named)
        if written := [name for name, x in call.tensors().items() if not torch.equal(x, kept[name])]:
            wrong.append([op, "compiled", "", "it wrote", written])
        torch.compiler.is_compiling = lambda: False
        if not all(map(torch.equal, compiled, BACKEND.function(op).load()(*arguments, **named))):
            wrong.append([op, "compiled", "", "other results", ""])
    print(json.dumps([counts, wrong]))


if __name__ == "__main__":
    main()
