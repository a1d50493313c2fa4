# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl kernels``: what it lists, and what it says of a model that was traced."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_fl.cli import kernel_trace
from sglang_fl.compat import installed_version

Cli = Callable[..., "pytest.CaptureResult[str]"]
Listed = Callable[..., dict[str, Any]]
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


@pytest.fixture
def output(cli: Cli) -> Callable[..., str]:
    return lambda *arguments: cli("kernels", *arguments).out


@pytest.fixture
def listed(output: Callable[..., str]) -> Listed:
    return lambda *arguments: {kernel["target"]: kernel for kernel in json.loads(output("--json", *arguments))["kernels"]}


def test_without_words_it_is_a_summary_by_module(output: Callable[..., str]) -> None:
    text = output()
    assert f"Kernels of SGLang {installed_version()}: " in text
    assert "sglang-fl kernels WORD lists those" in text
    assert "Not shown: " in text
    assert max(map(len, text.splitlines())) <= 100


def test_words_choose(output: Callable[..., str]) -> None:
    text = output("allocator", "ALLOC_extend")
    assert "sglang.kernels.ops.memory.allocator:\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    (row,) = (line for line in text.splitlines() if "alloc_extend_kernel" in line)
    assert "launched" in row
    assert "mem_cache/allocator/paged.py:" in row
    assert output("nothing-of-that-name") == "None has 'nothing-of-that-name'.\n"


def test_json_has_all_that_there_is(listed: Listed) -> None:
    kernel = listed("alloc_extend_kernel")[EXTEND]
    assert (kernel["call"], kernel["launches"], kernel["operator"]) == ("kernel[grid]", [], None)
    assert {site["where"] for site in kernel["sites"]} >= {"PagedTokenToKVPoolAllocator.alloc_extend"}


def test_what_has_a_reference_and_what_the_chips_package_replaces(
    output: Callable[..., str], listed: Listed, fastchip: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def counts() -> list[str]:
        (row,) = (line for line in output().splitlines() if "kernels.ops.memory.allocator" in line)
        return [cell.strip() for cell in row.split("│")[2:-2]]

    assert listed("alloc_extend_kernel")[EXTEND]["replaced_by"] is None
    assert counts() == ["2", "1", "2"], "launched, called, with a reference"
    fastchip(f"sglang_kernels={{{EXTEND!r}: 'os.path:join'}}")
    found = listed("memory.allocator")
    told = {name.rpartition(":")[2]: (kernel["reference"], kernel["replaced_by"]) for name, kernel in found.items()}
    assert told == {
        "alloc_extend_kernel": (True, "vendor.fastchip"),
        "alloc_decode_kernel": (True, None),
        "get_and_clear_swa_pages": (False, None),
    }
    text = output("alloc_")
    assert text.count("replaced by vendor.fastchip") == 1 and text.count("has a reference in plain PyTorch") == 2
    assert counts() == ["2", "1", "2", "1"], "and one that is replaced"


def test_layers_that_operators_cover_are_left_out(listed: Listed) -> None:
    rule = "sglang.kernels.ops.attention.fla.chunk:chunk_gated_delta_rule"
    assert rule not in listed("chunk_gated_delta_rule")
    assert listed("chunk_gated_delta_rule", "--all")[rule]["operator"] == "chunk_gated_delta_rule"


def test_what_a_model_reached(output: Callable[..., str], listed: Listed, model: Path) -> None:
    """Of a class, what its methods come to; what was replaced by the function that launches it; and no helper functions."""
    counts = {EXTEND: 12, f"{GATED_NORM}:rms_norm_gated": 5, "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func": 3}
    keep(model, {**counts, "sglang.kernels.jit.utils.common:cache_once": 2}, arguments=["--page-size", "4"])
    found = {name: kernel["reached"] for name, kernel in listed("--model", str(model)).items()}
    assert found == {
        EXTEND: 12,
        f"{GATED_NORM}:RMSNorm": 5,
        f"{GATED_NORM}:rms_norm_gated": 5,
        "sglang.srt.mem_cache.allocation:assign_req_to_token_pool": 3,
    }
    text = output("--model", str(model), "allocator")
    assert "served on cpu by SGLang" in text.replace("\n", " ")
    assert "--page-size 4" in text.replace("\n", " ")
    (row,) = (line for line in text.splitlines() if "alloc_extend_kernel" in line)
    assert "12" in row
    assert "RMSNorm" not in text


@pytest.mark.parametrize(
    ("other", "said"),
    [({"sglang": "0.5.1"}, "SGLang has another version now: trace again"), ({"failed": "a\nits last line"}, "its last line")],
)
def test_a_trace_that_says_less(output: Callable[..., str], model: Path, other: dict[str, Any], said: str) -> None:
    keep(model, {}, **other)
    text = " ".join(output("--model", str(model)).split())
    assert said in text
    assert text.endswith("None.")


def test_what_cannot_be_shown(cli: Cli, model: Path) -> None:
    for arguments, said in (
        (("--model", str(model)), f"{str(model)!r} was not traced yet: run sglang-fl kernels --model {model} --trace"),
        (("--model", f"{model}-2"), f"there is no file '{model}-2'"),
        (("--trace",), "--trace needs --model DIR"),
    ):
        assert said in cli("kernels", *arguments, code=2).err
