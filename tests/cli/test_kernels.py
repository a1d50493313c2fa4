# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl kernels``: what it lists, and what it says of a model that was traced."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_fl.cli import kernel_trace, main
from sglang_fl.compat import installed_version

EXTEND = "sglang.kernels.ops.memory.allocator:alloc_extend_kernel"
GATED_NORM = "sglang.kernels.ops.attention.fla.layernorm_gated"


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch, wide_terminal_without_colours: None) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = tmp_path / "qwen"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    return directory


def keep(model: Path, counts: dict[str, int], **other: Any) -> None:
    """What a trace of the model would have left."""
    file = kernel_trace._file(model)
    file.parent.mkdir(parents=True)
    about = {"model": str(model), "device": "cpu", "sglang": installed_version(), "date": "2026-11-28", "arguments": [], "failed": ""}
    file.write_text(json.dumps({**about, **other, "counts": counts}))


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["kernels", *arguments]) == 0
    return capsys.readouterr().out


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return {kernel["target"]: kernel for kernel in json.loads(output(capsys, "--json", *arguments))["kernels"]}


def test_without_words_it_is_a_summary_by_module(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys)
    assert f"Kernels of SGLang {installed_version()}: " in text
    assert "sglang-fl kernels WORD lists those" in text
    assert "Not shown: " in text
    assert max(map(len, text.splitlines())) <= 100


def test_words_choose(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "allocator", "ALLOC_extend")
    assert "sglang.kernels.ops.memory.allocator:\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    (row,) = (line for line in text.splitlines() if "alloc_extend_kernel" in line)
    assert "launched" in row
    assert "mem_cache/allocator/paged.py:" in row
    assert output(capsys, "nothing-of-that-name") == "None has 'nothing-of-that-name'.\n"


def test_json_has_all_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = listed(capsys, "alloc_extend_kernel")[EXTEND]
    assert (kernel["call"], kernel["launches"], kernel["operator"]) == ("kernel[grid]", [], None)
    assert {site["where"] for site in kernel["sites"]} >= {"PagedTokenToKVPoolAllocator.alloc_extend"}


def test_layers_that_operators_cover_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rule = "sglang.kernels.ops.attention.fla.chunk:chunk_gated_delta_rule"
    assert rule not in listed(capsys, "chunk_gated_delta_rule")
    assert listed(capsys, "chunk_gated_delta_rule", "--all")[rule]["operator"] == "chunk_gated_delta_rule"


def test_what_a_model_reached(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """Of a class, what its methods come to; what was replaced by the function that launches it; and no helper functions."""
    counts = {EXTEND: 12, f"{GATED_NORM}:rms_norm_gated": 5, "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func": 3}
    keep(model, {**counts, "sglang.kernels.jit.utils.common:cache_once": 2}, arguments=["--page-size", "4"])
    found = {name: kernel["reached"] for name, kernel in listed(capsys, "--model", str(model)).items()}
    assert found == {
        EXTEND: 12,
        f"{GATED_NORM}:RMSNorm": 5,
        f"{GATED_NORM}:rms_norm_gated": 5,
        "sglang.srt.mem_cache.allocation:assign_req_to_token_pool": 3,
    }
    text = output(capsys, "--model", str(model), "allocator")
    assert "served on cpu by SGLang" in text.replace("\n", " ")
    assert "--page-size 4" in text.replace("\n", " ")
    (row,) = (line for line in text.splitlines() if "alloc_extend_kernel" in line)
    assert "12" in row
    assert "RMSNorm" not in text


@pytest.mark.parametrize(
    ("other", "said"),
    [({"sglang": "0.5.1"}, "SGLang has another version now: trace again"), ({"failed": "a\nits last line"}, "its last line")],
)
def test_a_trace_that_says_less(capsys: pytest.CaptureFixture[str], model: Path, other: dict[str, Any], said: str) -> None:
    keep(model, {}, **other)
    text = " ".join(output(capsys, "--model", str(model)).split())
    assert said in text
    assert text.endswith("None.")


def test_what_cannot_be_shown(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    for arguments, said in (
        (("--model", str(model)), f"{str(model)!r} was not traced yet: run sglang-fl kernels --model {model} --trace"),
        (("--model", f"{model}-2"), f"there is no file '{model}-2'"),
        (("--trace",), "--trace needs --model DIR"),
    ):
        assert main(["kernels", *arguments]) == 2
        assert said in capsys.readouterr().err
