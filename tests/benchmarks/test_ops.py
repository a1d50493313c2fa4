# SPDX-License-Identifier: Apache-2.0
"""benchmarks/ops.py and result_file.py, on the CPU and at small shapes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ops
import pytest
import result_file
import torch
from backend_functions import reference

from sglang_fl.dispatch import SelectionPolicy, get_default_manager, reset_global_policy, set_global_policy
from sglang_fl.dispatch.catalog import classes_of
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.dispatch.types import BackendImplKind, OpImpl

CPU = torch.device("cpu")
#: Bytes to be moved at 3 tokens of hidden size 256 in bf16, one head_dim of 128; cos and sin, and a layer norm's weights, in fp32.
MOVED = {
    ("silu_and_mul", ""): 3 * (2 + 1) * 768 * 2,
    ("gelu_and_mul", ""): 3 * (2 + 1) * 768 * 2,
    ("gelu_and_mul", "none"): 3 * (2 + 1) * 768 * 2,
    ("new_gelu", ""): 3 * 2 * 1024 * 2,
    ("quick_gelu", ""): 3 * 2 * 1024 * 2,
    ("relu2", ""): 3 * 2 * 1024 * 2,
    ("rms_norm", ""): 3 * 2 * 256 * 2 + 256 * 2,
    ("rms_norm", "residual"): 3 * 4 * 256 * 2 + 256 * 2,
    ("gemma_rms_norm", ""): 3 * 2 * 256 * 2 + 256 * 2,
    ("gemma_rms_norm", "residual"): 3 * 4 * 256 * 2 + 256 * 2,
    ("layer_norm", ""): 3 * 2 * 256 * 2 + 2 * 256 * 4,
    ("rotary_embedding", ""): 3 * (2 * (256 + 128) * 2 + 8 + 128 * 4),
    ("topk", ""): 3 * (16 * 2 + 8 * (4 + 4)),
    ("mrotary_embedding", ""): 3 * 3 * 8 + 2 * 3 * (256 + 128) * 2 + 3 * 128 * 4,
}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    set_global_policy(SelectionPolicy(strict=True))
    with torch.inference_mode():
        yield
    reset_global_policy()


#: Of a convolution and of drafts' verification there is nothing but SGLang's own to compare on a GPU.
NOT_TIMED = {"fused_sigmoid_gating_delta_rule_update", "causal_conv1d_fn", "causal_conv1d_update"}


def test_every_operator_has_shapes() -> None:
    assert set(ops.FORMS) == {op for op in OPERATORS if classes_of(op)} - NOT_TIMED


@pytest.mark.parametrize("op", ops.FORMS)
def test_implementations_are_measured_on_sglangs_layers(op: str) -> None:
    manager = get_default_manager()
    manager.ensure_initialized(())
    impl = manager.registry.get_implementation(op, "reference.torch")
    assert impl is not None
    for form in ops.FORMS[op](256, torch.bfloat16, CPU):
        moved, timings = ops.measure(form, 3, [impl], 2, CPU)
        if op == "fused_moe":  # how many experts are read depends on where the tokens go
            x_and_out, routes, expert = 2 * 3 * 256 * 2, 3 * 2 * (4 + 4), 3 * 256 * 128 * 2
            assert (moved - x_and_out - routes) / expert in range(2, 7)
        else:
            assert moved == MOVED[op, form.variant]
        assert list(timings) == ["sglang", "reference.torch"]
        assert all(timing.error is None and timing.us for timing in timings.values())
        assert timings["sglang"].ratio == (1.0, 1.0, 1.0)


#: The same of the gated delta rule's decode in fp16, of 8 heads of q and 16 of v; a state is read and written.
_STATES, _TOKEN = 2 * 16 * 128 * 128 * 4, (2 * 8 + 2 * 16) * 128 * 2
MOVED_IN_DECODE = {
    "fused_recurrent_gated_delta_rule_packed_decode": 2 * (_STATES + _TOKEN + 2 * 16 * 2 + 4),
}
_IN_A_PROCESS = """
import json
import triton_on_cpu
triton_on_cpu.interpret()
import ops, torch
from sglang_fl.dispatch import get_default_manager

manager = get_default_manager()
manager.ensure_initialized(())
with torch.inference_mode():
    for op in {ops}:
        (form,) = ops.FORMS[op](1024, torch.float16, torch.device("cpu"))
        impl = manager.registry.get_implementation(op, "reference.torch")
        moved, timings = ops.measure(form, 2, [impl], 1, torch.device("cpu"))
        print(json.dumps([op, moved, {{name: timing.error for name, timing in timings.items()}}]))
"""


def test_the_gated_delta_rule_is_measured_on_sglangs_functions() -> None:
    """Their Triton kernels run in Triton's interpreter here, and what they give agrees with the reference."""
    code = _IN_A_PROCESS.format(ops=list(MOVED_IN_DECODE))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert rows == [[op, moved, {"sglang": None, "reference.torch": None}] for op, moved in MOVED_IN_DECODE.items()]


@pytest.mark.parametrize("hidden", [4096])
def test_rare_forms_of_rotary_embeddings(hidden: int) -> None:
    forms = {form.variant: form for form in ops.FORMS["rotary_embedding"](hidden, torch.bfloat16, CPU)}
    assert set(forms) == {"", "interleaved", "head_dim 64"}
    assert not forms["interleaved"].layer().is_neox_style
    assert forms["head_dim 64"].layer().head_size == 64
    positions, query, key = forms[""].inputs(5)
    assert (positions.shape, query.shape, key.shape) == ((5,), (5, 4096), (5, 1024))


def _wrong(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(reference.silu_and_mul(obj, x))


def _failing(obj: Any, x: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("out of luck")


@pytest.mark.parametrize(("fn", "told"), [(_wrong, "differs from SGLang's"), (_failing, "out of luck")])
def test_what_is_wrong_or_fails_is_a_row_with_an_error(fn: Any, told: str) -> None:
    impl = OpImpl("silu_and_mul", "vendor.test", BackendImplKind.VENDOR, fn, vendor="nvidia")
    (form,) = ops.FORMS["silu_and_mul"](128, torch.float32, CPU)
    moved, timings = ops.measure(form, 2, [impl], 2, CPU)
    rows = list(ops.rows_of("silu_and_mul", form, 128, 2, [impl], timings, 1e9, moved))
    assert [row["impl"] for row in rows] == ["sglang", "vendor.test"]
    assert told in rows[1]["error"]
    assert rows[0]["us"] and rows[1]["us"] is None
    assert "failed" in ops._cell(rows)


def test_the_fastest_is_the_one_that_is_faster_beyond_measurement() -> None:
    def row(impl: str, ratio: Any) -> dict[str, Any]:
        return {"impl": impl, "us": 2.0, "ratio": ratio, "error": None}

    rows = [row("sglang", None), row("a", [0.9, 0.8, 1.01]), row("b", [0.95, 0.93, 0.97])]
    assert ops._cell(rows).splitlines()[2].startswith("[bold green]b")
    assert ops._cell(rows[:2]).splitlines()[0].startswith("[bold green]sglang")


def test_result_files_have_a_line_for_each_row(tmp_path: Path) -> None:
    file = tmp_path / "new" / "ops.json"
    result_file.write(file, {"dtype": "bfloat16", "share": 0.123456}, [{"a": 1.23456789, "b": None, "c": [98765.4, "x"]}, {"a": 2}])
    assert '  {"a": 1.235, "c": [98770.0, "x"]},' in file.read_text().splitlines()
    assert result_file.read(file) == {"dtype": "bfloat16", "share": 0.1235, "rows": [{"a": 1.235, "c": [98770.0, "x"]}, {"a": 2}]}
    result_file.write(file, {}, [])
    assert result_file.read(file) == {"rows": []}
    file.write_text(json.dumps([]))
    with pytest.raises(ValueError, match="no result file"):
        result_file.read(file)


def test_the_header_names_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/ops.py", "/a/model", "--out", "/tmp/x/ops.json", "--quick", "--out=/x/y"])
    head = result_file.header(dtype="bfloat16")
    assert head["command"] == "python benchmarks/ops.py model --out ops.json --quick --out=y"
    assert head["dtype"] == "bfloat16" and head["versions"]["torch"] == torch.__version__.split("+")[0]
