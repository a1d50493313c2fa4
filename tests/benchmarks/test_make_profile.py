# SPDX-License-Identifier: Apache-2.0
"""benchmarks/make_profile.py: its rules on made-up results, and the profile in the repository against the measured ones."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import make_profile
import pytest
import result_file
import yaml
from make_profile import judge_function, judge_functions, order_of, profile

from sglang_fl.config import load_settings
from sglang_fl.dispatch.ops import OPERATORS

HEAD = {"machine": {"gpu": "Made-up GPU"}, "versions": {"torch": "9.9", "flag_gems": "8.8"}, "date": "2026-01-02"}
FASTER, EVEN, SLOWER = [0.9, 0.88, 0.92], [1.0, 0.97, 1.03], [1.5, 1.4, 1.6]
FLAGOS, VENDOR = ("default.flagos", "flagos"), ("vendor.cuda", "vendor")


@pytest.fixture(autouse=True)
def few_shapes_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_profile, "LEAST_SHAPES", 1)


def op_rows(op: str, ratios: Mapping[tuple[str, str], list[Any]]) -> list[dict[str, Any]]:
    """Rows of SGLang's own layer and of implementations; one ratio, or error text, for each shape."""
    rows: list[dict[str, Any]] = []
    for shape in range(max(map(len, ratios.values()))):
        base = {"op": op, "hidden": 1024, "tokens": 4**shape}
        rows.append(base | {"impl": "sglang", "kind": "sglang", "us": 2.0})
        for (impl, kind), found in ratios.items():
            if shape < len(found):
                result = {"error": found[shape]} if isinstance(found[shape], str) else {"us": 1.0, "ratio": found[shape]}
                rows.append(base | {"impl": impl, "kind": kind} | result)
    return rows


def served(*lines: str, settings: Mapping[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """A run of serving.py in which the variant ``mine`` logged these lines, and was as fast as native."""
    cases = [f"{phase}/{batch}" for phase in ("prefill", "decode") for batch in (1, 64)]
    rows = [{"case": case, "variant": "mine", "ratio": 1.01, "low": 0.96, "high": 1.06} for case in cases]
    run = {"model": "made-up-1b", "baseline": "native", "variants": {"native": {"SGLANG_PLUGINS": "none"}, "mine": settings or {}}}
    versions = {"torch": "9.9", "flag_gems": "8.8", "transformers": "7"}
    machine = {"machine": {"device": "Made-up GPU"}, "versions": versions, "rounds": [{}] * 6}
    return (
        run
        | machine
        | {"dispatched": {"native": [], "mine": list(lines)}, "summary": [{"case": "prefill/1", "variant": "native"}, *rows]}
        | changes
    )


LEFT = "SiluAndMul → sglang(policy)"
SERVED = [served(f"RMSNorm → {kind}({impl})", LEFT) for impl, kind in (FLAGOS, VENDOR)]


def order(runs: Sequence[Mapping[str, Any]] = SERVED, /, **ratios: list[Any]) -> tuple[list[str], dict[str, str]]:
    kinds = {"flagos": FLAGOS, "vendor": VENDOR, "reference": ("reference.torch", "reference")}
    found, verdicts = order_of("rms_norm", op_rows("rms_norm", {kinds[kind]: values for kind, values in ratios.items()}), runs)
    return found, {verdict.name: verdict.reason for verdict in verdicts}


def aten_row(**changes: Any) -> dict[str, Any]:
    row = {"key": "neg", "function": "neg", "call": "16x1024 bf16", "seen_eager": 3, "seen_captured": 5, "right": True, "graph_safe": True}
    return row | {"ratio": FASTER, "host_ratio": FASTER} | changes


class TestOperators:
    def test_what_is_faster_goes_first(self) -> None:
        assert order(flagos=[FASTER, FASTER])[0] == ["flagos", "sglang"]
        assert order(vendor=[FASTER, EVEN, FASTER])[0] == ["vendor", "sglang"]

    def test_the_fastest_in_the_median_goes_first(self) -> None:
        assert order(flagos=[FASTER, FASTER], vendor=[[0.8, 0.7, 0.9], FASTER])[0] == ["vendor", "sglang"]

    def test_one_slower_shape_disqualifies(self) -> None:
        found, reasons = order(flagos=[FASTER, FASTER, FASTER, SLOWER])
        assert found == ["sglang"]
        assert reasons["default.flagos"] == "1.50 times SGLang's time at 64x1024"

    def test_a_ratio_of_little_over_one_does_not(self) -> None:
        assert order(flagos=[FASTER, FASTER, [1.02, 1.01, 1.03]])[0] == ["flagos", "sglang"]
        assert order(flagos=[FASTER, FASTER, [1.021, 1.01, 1.03]])[0] == ["sglang"]

    def test_a_measurement_that_does_not_decide_disqualifies(self) -> None:
        found, reasons = order(flagos=[FASTER, FASTER, [0.9, 0.8, 1.4]])
        assert found == ["sglang"]
        assert reasons["default.flagos"] == "measured too vaguely (0.90, 0.80 to 1.40); measure again"
        assert order(flagos=[FASTER, FASTER, [0.8, 0.7, 0.95]])[0] == ["flagos", "sglang"], "vague, and faster all the same"

    def test_no_gain_in_the_median_disqualifies(self) -> None:
        found, reasons = order(flagos=[EVEN, FASTER, EVEN])
        assert found == ["sglang"]
        assert "1.000 times SGLang's time in the median (0.90 to 1.00), which is no gain of 2 %" in reasons["default.flagos"]
        assert order(flagos=[[0.98, 0.97, 0.99]] * 3)[0] == ["flagos", "sglang"]

    def test_what_is_slower_as_served_is_left_out(self) -> None:
        slower = {"case": "prefill/32", "variant": "mine", "ratio": 0.6, "low": 0.4, "high": 0.97}
        run = served("RMSNorm → flagos(default.flagos)")
        found, reasons = order([run, run | {"summary": [*run["summary"], slower]}], flagos=[FASTER])
        assert found == ["sglang"]
        assert reasons["default.flagos"].endswith(
            "; but serving made-up-1b with it has 0.60 of native's speed in prefill/32 (0.40 to 0.97)"
        )
        assert order([run | {"summary": [*run["summary"], slower | {"high": 0.99}]}], flagos=[FASTER])[0] == ["flagos", "sglang"]

    @pytest.mark.parametrize(
        "run",
        [
            served(LEFT),
            served("RMSNorm → flagos(default.flagos)", "SiluAndMul → flagos(default.flagos)"),
            served("RMSNorm → flagos(default.flagos)", "SiluAndMul → vendor(vendor.cuda)"),
            served("SiluAndMul → flagos(default.flagos)"),
            served("RMSNorm → vendor(vendor.cuda)"),
            served("RMSNorm → flagos(default.flagos)", settings={"SGLANG_FL_PREFER": "flagos"}),
            served("RMSNorm → flagos(default.flagos)", baseline="off"),
            served("RMSNorm → flagos(default.flagos)", summary=[]),
            served("RMSNorm → flagos(default.flagos)", summary=served()["summary"][:-1]),
            served("RMSNorm → flagos(default.flagos)", summary=[row for row in served()["summary"] if not row["case"].endswith("/1")]),
            served("RMSNorm → flagos(default.flagos)", rounds=[{}] * 5),
            served("RMSNorm → flagos(default.flagos)", "a line of another version"),
        ],
        ids=[
            "left",
            "another operator",
            "another implementation",
            "only another",
            "not it",
            "prefer",
            "no native",
            "cut off",
            "one batch",
            "no batch of 1",
            "few rounds",
            "unknown",
        ],
    )
    def test_what_no_model_was_served_with_alone_is_left_out(self, run: dict[str, Any]) -> None:
        found, reasons = order([run], flagos=[FASTER])
        assert found == ["sglang"] and reasons["default.flagos"].endswith("; but no model was served with it alone")

    def test_an_error_disqualifies(self) -> None:
        found, reasons = order(flagos=[FASTER, "RuntimeError: no"], vendor=[EVEN, EVEN])
        assert found == ["sglang"]
        assert reasons["default.flagos"] == "failed at 4x1024: RuntimeError: no"

    def test_a_shape_that_was_not_measured_disqualifies(self) -> None:
        found, reasons = order(flagos=[FASTER], vendor=[EVEN, EVEN])
        assert (found, reasons["default.flagos"]) == (["sglang"], "timed at 1 of 2 shapes only")

    def test_few_shapes_disqualify(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(make_profile, "LEAST_SHAPES", 6)
        found, reasons = order(flagos=[FASTER] * 5)
        assert (found, reasons["default.flagos"]) == (["sglang"], "timed at 5 of 6 shapes only")
        assert order(flagos=[FASTER] * 6)[0] == ["flagos", "sglang"]

    def test_plain_pytorch_is_never_an_answer(self) -> None:
        assert order(reference=[FASTER]) == (["sglang"], {})

    def test_of_two_of_a_kind_one_is_named(self) -> None:
        rows = op_rows("rms_norm", {VENDOR: [EVEN], ("vendor.other", "vendor"): [FASTER]})
        assert order_of("rms_norm", rows, [served("RMSNorm → vendor(vendor.other)")])[0] == ["impl:vendor.other", "sglang"]


class TestFunctions:
    def test_one_that_gains_everywhere_is_used(self) -> None:
        verdict = judge_function("neg", [aten_row(), aten_row(ratio=EVEN), aten_row()], passes=8)
        assert verdict.accepted
        assert verdict.reason == "0.900 times PyTorch's time in a graph in the median (0.90 to 1.00)"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"ratio": SLOWER}, "1.50 times PyTorch's time in a graph (16x1024 bf16)"),
            ({"host_ratio": [9.14, 9.0, 9.3]}, "9.14 times on the host (16x1024 bf16)"),
            (
                {"ratio": [42.4, 40, 45], "host_ratio": SLOWER},
                "42 times PyTorch's time in a graph (16x1024 bf16), 1.50 times on the host (16x1024 bf16)",
            ),
            ({"right": False, "why": "it is off"}, "neg(16x1024 bf16): it is off"),
            ({"right": None, "why": "its results are random"}, "neg(16x1024 bf16): its results are random"),
            ({"graph_safe": False, "graph_why": "it synchronises"}, "neg(16x1024 bf16) in a graph: it synchronises"),
            ({"graph_safe": None}, "neg(16x1024 bf16) in a graph: not shown to work"),
            ({"error": "it took too long", "ratio": None}, "neg(16x1024 bf16): it took too long"),
            ({"ratio": None}, "not all of its calls were timed"),
            ({"host_ratio": None}, "not all of its calls were timed"),
        ],
    )
    def test_one_bad_call_disqualifies(self, changes: dict[str, Any], reason: str) -> None:
        verdict = judge_function("neg", [aten_row(), aten_row(**changes), aten_row()], passes=8)
        assert (verdict.accepted, verdict.reason) == (False, reason)

    @pytest.mark.parametrize(("passes", "accepted"), [(80, True), (81, False)])
    def test_a_gain_in_few_forward_passes_does_not_pay(self, passes: int, accepted: bool) -> None:
        verdict = judge_function("neg", [aten_row(), aten_row()], passes=passes)
        assert verdict.accepted is accepted
        assert ("called in 8 of 81 forward passes only" in verdict.reason) is not accepted

    @pytest.mark.parametrize(
        ("changes", "broken"),
        [
            ({"right": False, "why": "it is off"}, True),
            ({"error": "it ended its process (exit code -6): ..."}, True),
            ({"error": "it was not measured: the time was used up"}, False),
            ({"right": None, "why": "its results are random"}, False),
            ({"graph_safe": False, "graph_why": "it synchronises"}, False),
            ({"graph_safe": False, "graph_why": "replayed with new data, result 0: 3 of 4 differ"}, True),
            ({"graph_safe": False, "graph_why": "replayed with new data, result 0: 3 of 4 differ", "seen_captured": 0}, False),
            ({"ratio": SLOWER}, False),
        ],
    )
    def test_what_is_broken_is_told_apart_from_what_is_slow(self, changes: dict[str, Any], broken: bool) -> None:
        assert judge_function("neg", [aten_row(), aten_row(**changes)], passes=8).broken is broken

    def test_a_reason_has_its_figures(self) -> None:
        unsafe = aten_row(graph_safe=False, graph_why="it synchronises", ratio=None, host_ratio=None)
        verdict = judge_function("neg", [unsafe, aten_row(host_ratio=SLOWER)], passes=8)
        assert verdict.reason == "1.50 times on the host (16x1024 bf16); neg(16x1024 bf16) in a graph: it synchronises"

    def test_what_pytorch_cannot_capture_either_is_no_fault(self) -> None:
        row = aten_row(graph_safe=None, graph_why="PyTorch's own cannot be captured either: pinned memory", ratio=None)
        assert judge_function("neg", [aten_row(), row], passes=8).accepted
        assert not judge_function("neg", [row], passes=8).accepted

    def test_no_gain_disqualifies(self) -> None:
        verdict = judge_function("neg", [aten_row(ratio=EVEN)], passes=8)
        assert not verdict.accepted and "no gain of 2 %" in verdict.reason

    def test_the_hosts_time_does_not_matter_where_graphs_alone_are_served(self) -> None:
        assert judge_function("neg", [aten_row(seen_eager=0, host_ratio=SLOWER)], passes=8).accepted

    def test_a_function_answers_for_all_its_names(self) -> None:
        rows = [aten_row(function="div"), aten_row(key="div.Scalar", function="div", ratio=SLOWER), aten_row(function="abs")]
        assert [(verdict.name, verdict.accepted) for verdict in judge_functions(rows)] == [("abs", True), ("div", False)]


def results(tmp_path: Path, gpu: str = "made-up", **changes: Any) -> Path:
    rows = [row for op in OPERATORS for row in op_rows(op, {FLAGOS: [FASTER if op == "rms_norm" else SLOWER], VENDOR: [EVEN]})]
    aten_rows = [aten_row(function=name, ratio=FASTER if name < "n" else SLOWER) for name in ("zeros", "abs", "neg", "cos")]
    aten_rows.append(aten_row(key="embedding", function="embedding", ratio=SLOWER, seen_eager=8, seen_captured=0))
    result_file.write(tmp_path / f"ops-{gpu}.json", HEAD | {"dtype": "bfloat16"}, rows)
    result_file.write(tmp_path / f"aten-{gpu}.json", HEAD | {"models": ["qwen3-0.6b", "qwen3-8b"]} | changes, aten_rows)
    another_gpu = SERVED[0] | {
        "machine": {"device": "Another"},
        "summary": [{"case": "prefill/1", "variant": "mine", "ratio": 0.1, "low": 0.1, "high": 0.1}],
    }
    others = [{"torch": "1", "flag_gems": "8.8"}, {"torch": "9.9"}, {}]
    runs = [*SERVED, another_gpu, *(another_gpu | {"machine": SERVED[0]["machine"], "versions": versions} for versions in others)]
    (tmp_path / f"serving-{gpu}.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    return tmp_path


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    ops = make_profile.read_ops(directory, "made-up")
    return ops, make_profile.read_aten(directory, "made-up"), make_profile.read_served(directory, ops, "made-up")


def test_the_profile_is_one_that_sglang_fl_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, aten, runs = read(results(tmp_path))
    text = profile(ops, aten, runs, "made-up")
    assert text == profile(ops, aten | {"rows": aten["rows"][::-1]}, runs, "made-up")
    found = yaml.safe_load(text)
    assert set(found) == {"op_backends", "flagos_faster", "flagos_scope"}
    assert found["flagos_faster"] == ["abs", "cos"]
    assert found["op_backends"] == {op: ["flagos", "sglang"] if op == "rms_norm" else ["sglang"] for op in OPERATORS}
    assert "# neg: 1.50 times PyTorch's time in a graph (16x1024 bf16)\n" in text
    assert "  # default.flagos: 1.50 times SGLang's time at 1x1024\n" in text
    assert "Made-up GPU on 2026-01-02" in text and "aten-made-up.json (2026-01-02)" in " ".join(text.replace("\n# ", " ").split())
    assert all(len(line) <= 110 for line in text.splitlines())
    (tmp_path / "nvidia.yaml").write_text(text)
    monkeypatch.setattr("sglang_fl.config.loader.PROFILES", tmp_path)
    settings = load_settings({"SGLANG_FL_PLATFORM": "nvidia"})
    assert settings.flagos_functions == ("abs", "cos")


@pytest.mark.parametrize(
    ("flagos", "triton", "faster"),
    [
        ([SLOWER] * 4, [EVEN] * 4, ["rms_norm"]),
        ([SLOWER] * 3 + [EVEN], [EVEN] * 3 + [[1.09, 1.0, 1.2]], ["rms_norm"]),
        ([SLOWER] * 3 + [EVEN], [EVEN] * 3 + [[1.11, 1.0, 1.2]], []),  # the fourth shape has 64 tokens
        ([EVEN] + [SLOWER] * 3, [[1.9, 1.8, 2.0]] + [EVEN] * 3, ["rms_norm"]),  # with one token, where it is not 1 µs
        ([EVEN] * 4, [EVEN] * 4, []),
        ([SLOWER] * 2, [EVEN, "RuntimeError: no"], []),
        ([SLOWER] * 2, [EVEN], []),
        (["RuntimeError: no", SLOWER], [EVEN, EVEN], ["rms_norm"]),
    ],
)
def test_our_triton_kernels_go_before_flaggems_where_they_are_faster(
    flagos: list[Any], triton: list[Any], faster: list[str], tmp_path: Path
) -> None:
    rows = op_rows("rms_norm", {FLAGOS: flagos, ("triton.sglang_fl", "triton"): triton})
    ops, aten, runs = read(results(tmp_path))
    result_file.write(tmp_path / "triton-made-up.json", HEAD | {"dtype": "bfloat16"}, rows)
    text = profile(ops, aten, runs, "made-up", make_profile.read_triton(tmp_path))
    assert yaml.safe_load(text)["triton_faster"] == faster
    assert "Made-up GPU on 2026-01-02: triton-made-up.json" in " ".join(text.replace("\n# ", " ").split())


def test_no_function_is_an_empty_list(tmp_path: Path) -> None:
    ops, aten, runs = read(results(tmp_path))
    text = profile(ops, aten | {"rows": []}, runs, "made-up")
    assert yaml.safe_load(text)["flagos_faster"] == []


def test_what_is_broken_is_listed(tmp_path: Path) -> None:
    ops, aten, runs = read(results(tmp_path))
    died = "it ended its process (exit code -6): python3: /build/triton/src/a.cc:6: bool visit(int *, int): Assertion `a == b' failed."
    rows = [*aten["rows"], aten_row(function="mm", error=died), aten_row(function="mul", right=False, why="it is off")]
    text = profile(ops, aten | {"rows": rows}, runs, "made-up")
    assert yaml.safe_load(text)["flagos_broken"] == ["mm", "mul"]
    assert "(exit code -6): Assertion `a == b' failed." in text and "/build" not in text
    (tmp_path / "nvidia.yaml").write_text(text)


def window(**microseconds: float) -> dict[str, Any]:
    return {
        "top": [{"name": name.replace("_kernel", "_kernel of rank 2"), "microseconds_per_step": us} for name, us in microseconds.items()]
    }


@pytest.mark.parametrize(
    ("times", "slower"),
    [
        ({"decode/1": (150, 80)}, ["mm"]),  # of 100 µs that were native's, 80 are others' now
        ({"decode/1": (150, 80), "prefill/1": (19, 80)}, []),  # in one window it is faster
        ({"decode/1": (20.3, 80)}, []),  # within what is no difference
        ({"decode/1": (0, 100)}, []),  # it did not run
    ],
)
def test_a_function_that_a_step_takes_longer_with_is_listed(
    times: Mapping[str, tuple[float, float]], slower: list[str], tmp_path: Path
) -> None:
    native = {phase: window(nvjet_a=60, nvjet_b=40, norm=5) for phase in times}
    flagos = {phase: window(mm_kernel_general=mine, nvjet_b=kept, norm=7) for phase, (mine, kept) in times.items()}
    run = served() | {"baseline": "native", "profile": {"windows": {"native": native, "flagos": flagos}}}
    ops, aten, runs = read(results(tmp_path))
    text = profile(ops, aten, runs, "made-up", traces=[run])
    assert yaml.safe_load(text).get("flagos_slower", []) == slower
    assert ("7.50 times as long" in text) is bool(slower), "150 µs in the place of 20"


def further(tmp_path: Path, number: int, ops: Sequence[str], ratio: list[float], **changes: Any) -> None:
    rows = [row for op in ops for row in op_rows(op, {FLAGOS: [ratio]})]
    result_file.write(tmp_path / f"ops-made-up.{number}.json", HEAD | {"dtype": "bfloat16", "date": f"2026-02-{number:02}"} | changes, rows)


def test_an_operator_is_judged_by_the_last_sitting_that_measured_it(tmp_path: Path) -> None:
    results(tmp_path)
    further(tmp_path, 2, ["relu2", "layer_norm"], SLOWER, note="What was left out.")
    further(tmp_path, 10, ["relu2"], FASTER)
    with (tmp_path / "serving-made-up.jsonl").open("a") as file:
        file.write(json.dumps(served("ReLU2 → flagos(default.flagos)")) + "\n")
    assert make_profile.find_gpu(tmp_path, None) == "made-up"
    text = profile(*read(tmp_path), "made-up")
    orders = yaml.safe_load(text)["op_backends"]
    assert orders["relu2"] == orders["rms_norm"] == ["flagos", "sglang"] and orders["layer_norm"] == ["sglang"]
    assert "on 2026-01-02 and 2026-02-02 and 2026-02-10" in " ".join(text.replace("\n# ", " ").split())
    assert "ops-made-up.2.json" in text and "# Note: What was left out." in text


def test_a_later_sitting_at_fewer_shapes_is_refused(tmp_path: Path) -> None:
    results(tmp_path)
    whole = [row for op in ("relu2",) for row in op_rows(op, {FLAGOS: [FASTER] * 3})]
    result_file.write(tmp_path / "ops-made-up.2.json", HEAD | {"dtype": "bfloat16"}, whole)
    make_profile.read_ops(tmp_path, "made-up")
    further(tmp_path, 3, ["relu2"], FASTER)
    with pytest.raises(ValueError, match=r"ops-made-up\.3\.json has relu2 at 1 shapes, without some of the 3 before"):
        make_profile.read_ops(tmp_path, "made-up")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("ops-made-up.json", lambda found: found["rows"].append({}), "missing required field `op`"),
        ("ops-made-up.json", lambda found: found.pop("machine"), "missing required field `machine`"),
        ("ops-made-up.json", lambda found: found["rows"][1].update(ratio=[float("nan")] * 3), "NaN is no figure"),
        ("ops-made-up.json", lambda found: found["rows"][1].update(ratio=[0, 0, 0]), "Expected `float` > 0"),
        ("ops-made-up.json", lambda found: found["rows"][1].update(op="rms_nrom"), "did you mean 'rms_norm'"),
        ("ops-made-up.json", lambda found: found["rows"].append(found["rows"][1]), "twice"),
        ("aten-made-up.json", lambda found: found["rows"][0].pop("seen_eager"), "missing required field `seen_eager`"),
        ("aten-made-up.json", lambda found: found["rows"][0].update(host_ratio=[-1, -1, -1]), "Expected `float` > 0"),
        ("aten-made-up.json", lambda found: found["rows"].pop(), "has no call of embedding"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(file: str, change: Any, told: str, tmp_path: Path) -> None:
    path = results(tmp_path) / file
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    failed = run("--results", str(tmp_path), "--profile", str(tmp_path / "p.yaml"))
    assert failed.returncode == 1
    assert file in failed.stderr and told in failed.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [('{"model": "x', ":1: Unterminated string"), ("[]", ":1: this is no run"), ("{}", "run 1 of serving-made-up.jsonl: Object missing")],
)
def test_a_run_that_is_none_is_refused_by_its_line(text: str, told: str, tmp_path: Path) -> None:
    (results(tmp_path) / "serving-made-up.jsonl").write_text(text + "\n")
    failed = run("--results", str(tmp_path), "--profile", str(tmp_path / "p.yaml"))
    assert failed.returncode == 1
    assert "serving-made-up.jsonl" in failed.stderr and told in failed.stderr


def test_runs_that_cannot_be_compared_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read(results(tmp_path))[2]) == len(SERVED)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and told[0].startswith("left out: run 3 of serving-made-up.jsonl, on Another with")


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([], True),
        ([{"right": None, "error": "it was not measured: the time was used up"}], True),
        ([{}, {"right": None, "why": "not compared"}], True),
        ([{}, {}], False),
        ([{"right": False}], False),
    ],
)
def test_what_was_broken_is_not_forgotten(rows: list[dict[str, Any]], kept: bool, tmp_path: Path) -> None:
    """Measured wrong once, a function serves again when it was shown right, and not when it was not measured."""
    there = tmp_path / "nvidia.yaml"
    make_profile.check_broken(there, [])
    there.write_text("flagos_broken: [mul]\n")
    found = [aten_row(), *(aten_row(function="mul", **changes) for changes in rows)]
    if not kept:
        make_profile.check_broken(there, found)
        return
    with pytest.raises(ValueError, match=r"mul is in flagos_broken of nvidia\.yaml"):
        make_profile.check_broken(there, found)


@pytest.mark.parametrize(
    ("what", "changes"),
    [("GPU", {"machine": {"gpu": "Another"}}), ("versions", {"versions": {"torch": "0"}}), ("dtype", {"dtype": "float16"})],
)
def test_sittings_that_differ_are_refused(what: str, changes: dict[str, Any], tmp_path: Path) -> None:
    results(tmp_path)
    further(tmp_path, 2, ["relu2"], SLOWER, **changes)
    with pytest.raises(ValueError, match=rf"ops-made-up\.2\.json and ops-made-up\.json are not alike: {what}"):
        make_profile.read_ops(tmp_path, "made-up")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command, in this process."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["make_profile.py", *args])
        try:
            make_profile.main()
        except SystemExit as ended:
            code = 1
            print(ended.code, file=errors)
    return subprocess.CompletedProcess(args, code, out.getvalue(), errors.getvalue())


def test_check_compares_and_writes_nothing(tmp_path: Path) -> None:
    places = ("--results", str(results(tmp_path)), "--profile", str(tmp_path / "nvidia.yaml"))
    assert run(*places).returncode == 0
    assert run(*places, "--check").returncode == 0
    changed = (tmp_path / "nvidia.yaml").read_text().replace("[abs, cos]", "[abs]")
    (tmp_path / "nvidia.yaml").write_text(changed)
    checked = run(*places, "--check")
    assert checked.returncode == 1 and "+flagos_faster: [abs, cos]" in checked.stdout
    assert (tmp_path / "nvidia.yaml").read_text() == changed


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    results(tmp_path, versions={"torch": "9.8"})
    assert "are not of one machine" in run("--results", str(tmp_path), "--profile", str(tmp_path / "p.yaml")).stderr
    results(tmp_path, "another")
    assert "choose one with --gpu" in run("--results", str(tmp_path), "--profile", str(tmp_path / "p.yaml")).stderr
    assert make_profile.find_gpu(tmp_path, "another") == "another"
    with pytest.raises(ValueError, match=r"no ops-lost\.json"):
        make_profile.find_gpu(tmp_path, "lost")


def test_the_profile_in_the_repository_is_what_the_results_say() -> None:
    if not list(make_profile.RESULTS.glob("ops-*.json")) or not list(make_profile.RESULTS.glob("aten-*.json")):
        pytest.skip("benchmarks/results has no measured ops-<gpu>.json and aten-<gpu>.json")
    checked = subprocess.run([sys.executable, make_profile.__file__, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
