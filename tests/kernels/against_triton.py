# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of ``sglang-fl check`` on SGLang's own kernels, in Triton's interpreter. Prints JSON.

For each kernel: how many small cases ran, and the outcomes of those that failed. This shows that ``check``
expects what SGLang's kernels do.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from triton_on_cpu import interpret

from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import OK, UNUSUAL
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch.catalog import FUNCTIONS
from sglang_fl.dispatch.signature import parameters_of
from sglang_fl.kernels.reference import REFERENCES

#: SGLang's looks at the device, and takes another way on a CPU; libdevice has no form for the interpreter; writes fp16 or bf16 only,
#: which the interpreter rounds otherwise.
NOT_HERE = ("murmur_hash32", "softcap_inplace_logits", "fused_qk_gemma_rmsnorm", "fused_qk_gemma_rmsnorm_with_gate")


#: Operators that replace a SGLang kernel, with arguments of the same names.
OPERATORS = ("fused_sigmoid_gating_delta_rule_update", "causal_conv1d_fn", "causal_conv1d_update")


def own(target: str) -> Callable[..., Any]:
    """SGLang's kernel, called with the grid first, or like the operator."""
    if target in OPERATORS:
        module, name = FUNCTIONS[target]
        function, names = getattr(importlib.import_module(module), name), [one.name for one in parameters_of(target) or ()]
        return lambda *args: function(**dict(zip(names, args, strict=False)))
    module, _, name = target.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    if REFERENCES[target].takes_grid:
        # SGLang does not launch a kernel with an empty grid.
        return lambda grid, *args, **named: kernel[grid](*args, **named) if all(grid) else None
    return lambda grid, *args, **named: kernel(*args, **named)


def main() -> None:
    interpret()
    torch.set_num_threads(1)
    found = {}
    for target in (*REFERENCES, *OPERATORS):
        if target.rpartition(":")[2] in NOT_HERE:
            continue
        impl = Implementation(target, own(target), None, torch.device("cpu"))
        dtype = torch.float32 if torch.float32 in OPERATORS_CHECKED[target].dtypes else torch.int64
        cases = [case for case in cases_of(target, frozenset({dtype}), torch.device("cpu"), quick=True) if case.check == UNUSUAL]
        outcomes = [(case.name, check_case(impl, case, int(sys.argv[1]))) for case in cases]
        found[target] = {"ran": len(cases), "failed": [(name, *astuple(one)[:2]) for name, one in outcomes if one.status != OK]}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
