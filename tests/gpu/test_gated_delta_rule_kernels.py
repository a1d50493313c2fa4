# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: every implementation of the gated delta rule, in the cases of ``sglang-fl check``, graphs included."""

import random
from typing import Any

import pytest
import torch

from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import COMPILE, FAILED, THREADS
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch import OpManager, SelectionPolicy
from sglang_fl.dispatch.backends.flaggems import library

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

KINDS = ("flagos", "triton", "vendor", "reference")
PACKED = "fused_recurrent_gated_delta_rule_packed_decode"
OPERATORS = [op for op in OPERATORS_CHECKED if "gated_delta_rule" in op and ":" not in op]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlagGems's kernels in configurations drawn at random: it would choose any of them, and they must all be right.

    Its own tuning compiles about a hundred for each size of head and dtype, which takes minutes, and keeps what it found for
    the machine's later runs.
    """
    library.load()
    from flag_gems.utils.libentry import LibTuner
    from triton.runtime.errors import OutOfResources

    drawn: dict[Any, Any] = {}

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        named = {**tuner.nargs, **kwargs}
        key = (tuner.__name__, tuner.get_key({name: named[name] for name in tuner.arg_names if name in named}))
        configurations = [drawn[key]] if key in drawn else list(tuner.prune_configs(kwargs))
        for configuration in random.sample(configurations, len(configurations)):
            try:
                done = tuner.fn.run(*args, **kwargs, **configuration.all_kwargs())
            except OutOfResources:  # tuning leaves it out, too
                continue
            if key not in drawn:
                print(f"{tuner.__name__} {key[1]}: {configuration}")
            drawn[key] = tuner.best_config = configuration
            tuner.nargs = None
            return done
        raise AssertionError(f"no configuration of {tuner.__name__} can run")

    monkeypatch.setattr(LibTuner, "run", run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_against_float64(op: str, kind: str, dtype: torch.dtype) -> None:
    plan = OpManager().plan(op, SelectionPolicy(per_op_order=((op, (kind,)),)))
    if op == "fused_recurrent_gated_delta_rule" and kind != "reference":
        pytest.skip("nothing in SGLang calls it: only the reference has it")
    if kind == "triton" and op != PACKED:
        pytest.skip("this package has no kernel for it")
    assert plan.candidates, plan.describe()
    found = plan.candidates[0]
    dtypes = found.dtypes()
    if dtypes is not None and dtype not in dtypes:
        pytest.skip(f"{found.impl_id} does not take {dtype}, and says so")
    impl = Implementation(op, found.function, None, CUDA, writes_inputs=found.writes_inputs)
    failures = []
    worst = 0.0
    # What takes time is float64 on the host, token after token: thousands of them take it minutes, and are the check's to hold.
    for number, case in enumerate(cases_of(op, frozenset({dtype}), CUDA, quick=True)):
        if case.check in (THREADS, COMPILE):
            continue
        outcome = check_case(impl, case, number)
        if outcome.status == FAILED:
            failures.append((case.check, case.name, outcome.message))
        elif outcome.error_ulp is not None and outcome.bound_ulp:
            worst = max(worst, outcome.error_ulp / outcome.bound_ulp)
    print(f"{op} {found.impl_id} {dtype}: at most {worst:.3f} of its bound")
    assert failures == []
