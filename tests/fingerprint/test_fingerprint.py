# SPDX-License-Identifier: Apache-2.0
"""What a server says that it runs, and what two of them do differently."""

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_fl.aten import AtenReport
from sglang_fl.cli import main
from sglang_fl.config import SettingsError, load_settings
from sglang_fl.device import Device
from sglang_fl.dispatch.bridge.report import BindReport
from sglang_fl.fingerprint import compare, fingerprint, read, versions
from sglang_fl.fingerprint.announce import METRIC, _set_metric, _started, announce, server_facts
from sglang_fl.fingerprint.compare import Difference

NVIDIA = Device("nvidia", "cuda", "cuda", "card 'NVIDIA H100'")
CUDA, REFERENCE = "vendor(vendor.cuda)", "reference(reference.torch)"
BOUND = BindReport(
    Counter({("rms_norm", "RMSNorm", CUDA): 57, ("rms_norm", "Gemma4RMSNorm", "sglang(scale_shift=1.0)"): 2, ("topk", "TopK", CUDA): 4}),
    {("chunk_gated_delta_rule", "chunk_gated_delta_rule"): REFERENCE},
)
REPLACED = AtenReport((("mm", "mm"), ("add.Tensor", "add")), (("pad", "pad", "it raised in a capture"), ("sin", "sin", "")), in_graphs=True)
ENVIRON = {"SGLANG_FL_FLAGOS_WHITELIST": "mm,add,pad", "SGLANG_FL_PER_OP": "rms_norm=vendor|sglang"}
Change = Callable[[dict[str, Any]], object]


def facts(**environ: str) -> dict[str, Any]:
    settings = load_settings({**ENVIRON, **environ}, device=NVIDIA)
    return server_facts("Qwen3ForCausalLM", settings, NVIDIA, BOUND, REPLACED)


def runs(model: str, destination: str) -> dict[str, Any]:
    """The facts of a model that has one operator."""
    return {**facts(), "model": model, "operators": [{"op": "rms_norm", "picked": destination, "runs_on": [destination]}]}


def log_of(path: Path, *models: dict[str, Any], started: str | None = None) -> Path:
    start = {} if started is None else {"started": started}
    lines = [
        f"[2026-11-28 11:50:00 TP0] sglang-fl: fingerprint {fingerprint(found)} of {found['model']}: {json.dumps({**start, **found})}"
        for found in models
    ]
    path.write_text("\n".join(["[2026-11-28 11:49:59] INFO: loading", *lines, "ready"]))
    return path


def test_what_a_server_says() -> None:
    found = facts()
    assert [(row["op"], row["picked"]) for row in found["operators"]] == [
        ("chunk_gated_delta_rule", REFERENCE),
        ("rms_norm", f"sglang(scale_shift=1.0); {CUDA}"),
        ("topk", CUDA),
    ]
    assert (found["aten_functions"], found["aten_scope"]) == (["add", "mm"], "graphs")
    assert found["left_out"] == {"pad": "it raised in a capture"}, "and not sin, which the settings leave to PyTorch"
    assert found["settings"]["op_backends.rms_norm"] == {"value": ["vendor", "sglang"], "source": "SGLANG_FL_PER_OP"}
    assert found["versions"] == versions() and found["versions"]["sglang"].startswith("0.5.")
    assert (found["device"], found["evidence"], found["profile"]) == ("nvidia", "card 'NVIDIA H100'", "nvidia")


def test_kernels_that_something_else_runs_are_told() -> None:
    kernel, mine = "sglang.srt.mem_cache.allocation:assign_req_to_token_pool", "vendor(vendor.mychip)"
    found = server_facts("Qwen3ForCausalLM", load_settings(ENVIRON, device=NVIDIA), NVIDIA, BOUND, REPLACED, {mine: [kernel]})
    assert {"op": kernel, "picked": mine, "runs_on": [mine]} in found["operators"]
    assert fingerprint(found) != fingerprint(facts())


CHANGES: list[tuple[str, Change, tuple[str, str] | None]] = [
    ("a version", lambda found: found["versions"].update(torch="2.13.0"), ("version", "torch")),
    ("a package that is not there", lambda found: found["versions"].update(triton=None), ("version", "triton")),
    ("a card", lambda found: found.update(evidence="card 'NVIDIA H200'"), ("device", "found by")),
    ("a profile", lambda found: found.update(profile="metax"), ("device", "profile")),
    ("a setting", lambda found: found["settings"]["strict"].update(value=True), ("setting", "strict")),
    ("an order", lambda found: found["settings"].pop("op_backends.rms_norm"), ("setting", "op_backends.rms_norm")),
    ("a binding", lambda found: found["operators"][2].update(runs_on=[REFERENCE]), ("operator", "topk")),
    ("one binding of two", lambda found: found["operators"][1].update(runs_on=[CUDA]), ("operator", "rms_norm")),
    ("a function", lambda found: found["aten_functions"].remove("mm"), ("FlagGems function", "mm")),
    ("something left out", lambda found: found["left_out"].update(mm="it hung"), ("left out", "mm")),
    ("the model", lambda found: found.update(model="LlamaForCausalLM"), ("model", "LlamaForCausalLM")),
    ("where a setting is from", lambda found: found["settings"]["strict"].update(source="b.yaml:3"), None),
    ("when something failed", lambda found: found["left_out"].update(pad="it raised in a capture, last on 2026-11-28"), None),
]


@pytest.mark.parametrize(("change", "name"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_difference_is_named_and_changes_the_fingerprint(change: Change, name: tuple[str, str] | None, tmp_path: Path) -> None:
    here, there = facts(), copy.deepcopy(facts())
    change(there)
    found = compare(read(log_of(tmp_path / "a", here)), read(log_of(tmp_path / "b", there)))
    assert (name in [(difference.what, difference.name) for difference in found]) == (name is not None)
    assert len(found) == (0 if name is None else 2 if name[0] == "model" else 1)
    assert (fingerprint(here) != fingerprint(there)) == (name is not None)


def test_what_is_logged_is_no_part_of_the_fingerprint() -> None:
    assert fingerprint(facts(SGLANG_FL_LOG_LEVEL="debug", SGLANG_FLAGGEMS_RECORD="1")) == fingerprint(facts())
    assert fingerprint(facts(SGLANG_FL_STRICT="1")) != fingerprint(facts())


def test_why_an_operator_stays_with_sglang_is_shown_and_is_no_difference(tmp_path: Path) -> None:
    other = facts()
    other["operators"][1]["runs_on"] = ["sglang(another reason; and one more)", CUDA]
    assert compare(read(log_of(tmp_path / "a", facts())), read(log_of(tmp_path / "b", other))) == []


def test_what_was_announced_last_counts_and_a_cut_line_does_not(tmp_path: Path) -> None:
    earlier, draft = facts(SGLANG_FL_STRICT="1"), {**facts(), "model": "LlamaForCausalLMEagle3"}
    log = log_of(tmp_path / "log", earlier, facts(), draft)
    log.write_text(log.read_text() + '\nsglang-fl: fingerprint 0123456789ab of Qwen3ForCausalLM: {"model": "Qwen3For')
    assert read(log) == [facts(), draft]
    without_draft = log_of(tmp_path / "other", facts())
    names = {(difference.what, difference.name) for difference in compare(read(log), read(without_draft))}
    assert names == {
        ("model", "LlamaForCausalLMEagle3"),
        *(("operator", f"{op} of LlamaForCausalLMEagle3") for op in ("chunk_gated_delta_rule", "rms_norm", "topk")),
    }


def test_a_target_and_a_draft_of_the_same_class_are_compared_each(tmp_path: Path) -> None:
    draft = runs("Qwen3ForCausalLM (draft)", "sglang")
    logs = [log_of(tmp_path / to, runs("Qwen3ForCausalLM", to), draft, started="11:50") for to in (REFERENCE, CUDA)]
    assert compare(*map(read, logs)) == [Difference("operator", "rms_norm", REFERENCE, CUDA)]


def test_the_last_start_in_a_log_counts(tmp_path: Path) -> None:
    served, draft = facts(), runs("LlamaForCausalLMEagle3 (draft)", CUDA)
    earlier = [runs("LlamaForCausalLM", REFERENCE), facts(SGLANG_FL_STRICT="1"), draft]
    texts = [
        log_of(tmp_path / "log", *found, started=started).read_text()
        for started, found in ((None, earlier), ("2026-11-28T11:50:00+00:00", earlier), ("2026-11-28T11:55:00+00:00", [served]))
    ]
    (tmp_path / "log").write_text("\n".join(texts))
    assert read(tmp_path / "log") == [served]


def test_replicas_that_start_together_are_read_apart(tmp_path: Path) -> None:
    target, draft = runs("Qwen3ForCausalLM", REFERENCE), runs("Qwen3ForCausalLM (draft)", CUDA)
    turns = [(target, "11:50:00"), (target, "11:50:01"), (draft, "11:50:00"), (draft, "11:50:01")]
    (tmp_path / "log").write_text("\n".join(log_of(tmp_path / "line", found, started=started).read_text() for found, started in turns))
    assert read(tmp_path / "log") == [target, draft]


@pytest.mark.parametrize("started", ["2026-11-28T11:50:00+00:00", None])
def test_a_target_that_is_announced_again_stays_the_target(started: str | None, tmp_path: Path) -> None:
    target, draft = runs("Qwen3ForCausalLM", REFERENCE), runs("LlamaForCausalLMEagle3 (draft)", CUDA)
    again = {**target, "left_out": {"mm": "it raised in a capture"}}
    twice = read(log_of(tmp_path / "twice", target, draft, again, started=started))
    assert twice == [again, draft]
    assert compare(twice, read(log_of(tmp_path / "once", again, draft, started=started))) == []


def test_an_implementation_that_ended_an_earlier_start_is_left_out() -> None:
    excluded = {
        "rms_norm: default.flagos": "it hung",
        "gelu_and_mul: default.flagos": "no layer of this model",
        "mm": "in the other report",
    }
    found = server_facts("Qwen3ForCausalLM", load_settings(ENVIRON, device=NVIDIA), NVIDIA, BOUND, REPLACED, excluded=excluded)
    assert found["left_out"] == {**facts()["left_out"], "rms_norm: default.flagos": "it hung"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("versions", None), ("device", ["x"]), ("settings", {"strict": True}), ("operators", ["topk"]), ("operators", [{"op": "topk"}])],
)
def test_facts_of_other_types_are_none(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({**facts(), key: value}))
    with pytest.raises(SettingsError, match="is neither what"):
        read(tmp_path / "file")


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps(facts()), encoding="utf-8-sig")
    assert read(tmp_path / "file") == [facts()]


@pytest.mark.parametrize("text", ["", "a log without a fingerprint", "[]", "{}", '{"device": "cpu", "operators": []}'])
def test_a_file_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(SettingsError, match="is neither what 'sglang-fl ops --json' prints nor a server's log"):
        read(tmp_path / "file")
    with pytest.raises(SettingsError, match="cannot be read"):
        read(tmp_path / "no such file")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for file, order in zip(files, ("reference", "sglang"), strict=True):
        monkeypatch.setenv("SGLANG_FL_PER_OP", f"relu2={order}")
        assert main(["ops", "--json"]) == 0
        Path(file).write_text(capsys.readouterr().out)
    assert main(["ops", "--diff", files[0], files[0]]) == 0
    assert "No differences between" in capsys.readouterr().out
    assert main(["ops", "--diff", *files]) == 1
    told = capsys.readouterr().out
    assert "Differences: 2" in told and "operator relu2" in told and "(SGLANG_FL_PER_OP)" in told
    assert main(["ops", "--diff", *files, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["a"], found["b"]) == tuple(files)
    assert [(row["what"], row["name"]) for row in found["differences"]] == [("setting", "op_backends.relu2"), ("operator", "relu2")]
    assert main(["ops", "--diff", files[0], str(tmp_path / "none")]) == 2


def test_without_a_server_there_is_a_log_line_and_no_metric(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "sglang_fl"):
        mark = announce(server_facts("Qwen3ForCausalLM", load_settings(ENVIRON, device=NVIDIA), NVIDIA, BOUND, REPLACED), logging.INFO)
    (line,) = caplog.messages
    assert line.startswith(f"sglang-fl: fingerprint {mark} of Qwen3ForCausalLM: ")
    (tmp_path / "log").write_text(line)
    assert read(tmp_path / "log") == [facts()] and mark == fingerprint(facts())
    assert json.loads(line.partition(" of Qwen3ForCausalLM: ")[2])["started"] == _started


def samples(model: str) -> list[Any]:
    from prometheus_client import REGISTRY

    found = [sample for family in REGISTRY.collect() for sample in family.samples if sample.name == METRIC]
    return [sample for sample in found if sample.labels["model"].startswith(model)]


def test_the_metric_shows_what_runs_now() -> None:
    earlier, now = facts(), {**facts(), "left_out": {"mm": "it raised in a capture"}}
    for found in (earlier, now):
        _set_metric(fingerprint(found), found)
    assert {(sample.labels["left_out"], sample.value) for sample in samples("Qwen3")} == {("pad", 0), ("mm", 1)}


def test_a_target_and_a_draft_of_the_same_class_have_a_sample_each() -> None:
    for found in (runs("LlamaForCausalLM", REFERENCE), runs("LlamaForCausalLM (draft)", "sglang")):
        _set_metric(fingerprint(found), found)
    assert {(sample.labels["model"], sample.labels["bindings"], sample.value) for sample in samples("Llama")} == {
        ("LlamaForCausalLM", f"rms_norm={REFERENCE}", 1),
        ("LlamaForCausalLM (draft)", "rms_norm=sglang", 1),
    }
