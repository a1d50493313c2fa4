# SPDX-License-Identifier: Apache-2.0
"""The demo model in SGLang's own ModelRunner, in a process of its own, with functions planted as FlagGems's would be."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import planted_faults
import psutil
import pytest

from sglang_fl.cli.demo_model import demo_model
from sglang_fl.model_run import Batch, CallFailed, Crashed, LoadedModel, Replacement
from sglang_fl.model_run.processes import is_missing_directory, ranks_of
from sglang_fl.model_run.switches import ATEN, LAYER

pytestmark = pytest.mark.e2e

RNG = np.random.default_rng(3)
MANY = Batch("many", tuple(tuple(RNG.integers(5, 490, size=12 + n).tolist()) for n in range(3)), 2)
NORM = Replacement(LAYER, "RMSNorm", "vendor.planted")
SILU = Replacement(ATEN, "silu", "silu")


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    with LoadedModel(str(demo_model()), ["--dtype", "float32"], {**planted_faults.ENVIRON, "OMP_NUM_THREADS": "1"}) as model:
        yield model


def replacements(run: Any) -> Any:
    return run.switches.replacements


def logprobs(run: Any, batch: Batch, on: Any) -> Any:
    with run.switches.only(run.switches.replacements if on is None else on):
        return run.logprobs(batch)


def calls(run: Any, batch: Batch) -> Any:
    """(what is called, phase) -> how often."""
    found: Counter[Any] = Counter()

    def counting(name: Any, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name, run.phase[1]] += 1
            return function(*args, **kwargs)

        return counted

    with run.switches.observed(
        lambda call: counting(call.path, call.forward(None)), lambda call: counting(f"aten::{call.key}", call.registered)
    ):
        run.logprobs(batch)
    return found


def bound(run: Any, on: Any) -> Any:
    """The layer classes that are bound, with these on and afterwards."""

    def classes() -> set[str]:
        return {type(layer).__name__ for layer in run.model.modules() if getattr(layer, "_forward_method", None) is not None}

    with run.switches.only(on):
        found = classes()
    return found, classes()


def raises(run: Any) -> None:
    raise ValueError("on purpose")


def crashes(run: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_what_is_replaced_has_names(loaded: LoadedModel) -> None:
    (found,) = loaded.call(replacements)
    assert {(one.kind, one.name) for one in found} >= {
        (LAYER, "RMSNorm"),
        (LAYER, "RotaryEmbedding"),
        (LAYER, "SiluAndMul"),
        (ATEN, "silu"),
    }
    assert NORM in found and SILU in found


def test_everything_left_to_sglang_is_the_same_twice_and_differs_by_rounding_from_what_is_in_force(loaded: LoadedModel) -> None:
    (native,), (again,), (in_force,) = (loaded.call(logprobs, MANY, on) for on in ((), (), None))
    assert native.shape == (3, 3) and (native < 0).all()
    assert (native == again).all()
    assert 0 < abs(native - in_force).max() < 1e-3


def test_a_layer_class_is_switched_alone(loaded: LoadedModel) -> None:
    every = {"RMSNorm", "RotaryEmbedding", "SiluAndMul"}
    assert loaded.call(bound, (NORM,)) == [({"RMSNorm"}, every)], "afterwards all is in force again"
    assert loaded.call(bound, ()) == [(set(), every)]


def test_a_name_that_is_not_replaced_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(CallFailed, match=r"ValueError: not replacements in this process: RMSNorm → vendor\.other"):
        loaded.call(logprobs, MANY, (replace(NORM, by="vendor.other"),))


def test_each_call_of_a_layer_and_of_a_function_is_seen(loaded: LoadedModel) -> None:
    (found,) = loaded.call(calls, MANY)
    assert found["model.layers.1.input_layernorm", "prefill"] == 1
    assert found["model.layers.1.input_layernorm", "decode"] == 2
    assert found["aten::silu", "decode"] >= 3 * 2


def test_what_raises_says_so_and_the_model_goes_on(loaded: LoadedModel) -> None:
    with pytest.raises(CallFailed, match=r"the model's process: ValueError: on purpose") as error:
        loaded.call(raises)
    assert "test_model_run.py" in error.value.output
    too_long = Batch("long", (tuple([7] * 4000),), 2)
    with pytest.raises(CallFailed, match=r"a sequence of 4000 tokens is longer than the model takes here, 2048"):
        loaded.call(logprobs, too_long, None)
    assert loaded.call(replacements)


def test_a_crash_is_an_answer_and_nothing_is_left_running(loaded: LoadedModel) -> None:
    with pytest.raises(Crashed, match=r"the model's process ended: signal 11 \(SIGSEGV\)"):
        loaded.call(crashes)
    names = [
        " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["ppid"] == os.getpid()
    ]
    assert not [name for name in names if "model_run.worker" in name]


@pytest.mark.parametrize("arguments", [["--tp", "2"], ["--tp-size=2"], ["--dtype", "float32", "--tensor-parallel-size", "2"]])
def test_ranks_are_read_from_the_servers_arguments(arguments: list[str]) -> None:
    assert ranks_of(arguments) == 2
    assert ranks_of(["--tp", "two"]) == ranks_of([]) == 1


def test_a_path_is_told_from_a_name_on_the_hub() -> None:
    assert is_missing_directory("/no/such/model") and is_missing_directory("./model") and is_missing_directory("~/no/such/model")
    assert not is_missing_directory("Qwen/Qwen3-8B") and not is_missing_directory("/tmp")
