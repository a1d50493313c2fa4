# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: FlagGems's chunked delta rule in other configurations than the one that its tuning chose for ``sglang-fl check``."""

import random
from typing import Any

import pytest
import torch

from sglang_fl.check.cases import cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import FAILED, SERVING
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch import OpManager, SelectionPolicy
from sglang_fl.dispatch.backends.flaggems import library

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

OP = "chunk_gated_delta_rule"
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(dtype: torch.dtype) -> None:
    (found,) = OpManager().plan(OP, SelectionPolicy(per_op_order=((OP, ("flagos",)),))).candidates
    impl = Implementation(OP, found.function, None, CUDA, writes_inputs=found.writes_inputs)
    every = cases_of(OP, frozenset({dtype}), CUDA, quick=True)
    cases = [case for case in every if case.check == SERVING or case.name.startswith("key_dim=")]
    assert len(cases) > 3
    failures = []
    for number, case in enumerate(cases):
        outcome = check_case(impl, case, number)
        if outcome.status == FAILED:
            failures.append((case.check, case.name, outcome.message))
    assert failures == []
