# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/serving.py that need no engine."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
import shapes
from serving_lib import results, rounds, summary, table, tokens, variants

from sglang_fl.config import load_settings
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.tune import served
from sglang_fl.tune.engine import EngineFailed, Engines


class Answering:
    """Stands for an engine: takes as long as it is told, and remembers what it was asked."""

    def __init__(self, name: str, seconds_per_token: float, log: list[Any], fails_at: int | None = None):
        self.name, self.ready = name, True
        self._seconds, self._log, self._fails_at = seconds_per_token, log, fails_at

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        if do == "flush":
            return {}
        self._log.append((self.name, values))
        if self._fails_at == len(self._log):
            raise EngineFailed(f"{self.name}: gone")
        return {"seconds": 1.0 + self._seconds * values["max_new_tokens"], "cached_tokens": 0}

    def pause(self) -> None:
        pass

    def kill(self) -> None:
        self.ready = False


SHELL = {"PATH": "/bin", "SGLANG_FL_STRICT": "1", "_SGLANG_FL_X": "1", "USE_FLAGGEMS": "1", "FLAGCX_PATH": "/x", "SGLANG_PLUGINS": "a"}


class TestVariants:
    def test_settings_of_the_shell_do_not_reach_an_engine(self) -> None:
        (default,) = variants.choose(["default"], [], plain_cpu=False)
        assert default.environ(SHELL, Path("log")) == {"PATH": "/bin", "PYTHONHASHSEED": "0", "SGLANG_FL_DISPATCH_LOG": "log"}

    def test_native_loads_no_plugin(self) -> None:
        (native,) = variants.choose(["native"], [], plain_cpu=False)
        assert native.environ({**SHELL, "SGLANG_PLATFORM": "sglang_fl"}, Path("log")) == {
            "PATH": "/bin",
            "PYTHONHASHSEED": "0",
            "SGLANG_PLUGINS": "none",
        }

    def test_off_leaves_every_operator_to_sglang(self) -> None:
        (off,) = variants.choose(["off"], [], plain_cpu=True)
        assert set(off.settings["SGLANG_FL_PER_OP"].split(";")) == {f"{op}=sglang" for op in OPERATORS}
        assert off.settings["USE_FLAGGEMS"] == "0"

    @pytest.mark.parametrize(("name", "order"), [("flaggems", "flagos|vendor|reference"), ("triton", "triton|flagos|vendor|reference")])
    def test_flagos_without_and_with_our_triton_kernels(self, name: str, order: str) -> None:
        (variant,) = variants.choose([name], [], plain_cpu=False)
        settings = load_settings({**variant.settings, "SGLANG_FL_PLATFORM": "nvidia"})
        assert settings.prefer == "flagos"
        assert {"|".join(found) for _, found in settings.op_backends} == {order} and len(settings.op_backends) == len(OPERATORS)

    @pytest.mark.parametrize("name", ["flagos", "vendor", "reference"])
    def test_a_preference(self, name: str) -> None:
        (variant,) = variants.choose([name], [], plain_cpu=False)
        assert variant.settings == {"SGLANG_FL_PREFER": name}

    def test_ones_own_come_last_unless_named_and_may_have_commas_in_values(self) -> None:
        own = ["mine:SGLANG_FL_OOT_BLACKLIST=RMSNorm,SiluAndMul,USE_FLAGGEMS=0", "other:A=b=c"]
        found = variants.choose(["mine", "default"], own, plain_cpu=False)
        assert [variant.name for variant in found] == ["mine", "default", "other"]
        assert found[0].settings == {"SGLANG_FL_OOT_BLACKLIST": "RMSNorm,SiluAndMul", "USE_FLAGGEMS": "0"}
        assert found[2].settings == {"A": "b=c"}

    def test_native_on_a_plain_cpu_names_the_other_baseline(self) -> None:
        with pytest.raises(variants.BadVariant, match="--variants off,default"):
            variants.choose(["native"], [], plain_cpu=True)
        assert "native" not in variants.default_names(plain_cpu=True)

    def test_a_variant_can_be_taken_a_second_time(self) -> None:
        names = ["native", "native-again", "native-no-custom-ar", "native-no-custom-ar-again", "mine-again"]
        found = variants.choose(names, ["mine:A=b"], plain_cpu=False)
        assert [variant.name for variant in found] == [*names, "mine"]
        for once, again in ((0, 1), (2, 3), (5, 4)):
            assert found[once].settings == found[again].settings and found[once].arguments == found[again].arguments
        assert found[1].native and found[3].arguments == {"disable_custom_all_reduce": True} and found[4].settings == {"A": "b"}

    def test_an_unknown_variant_names_the_nearest(self) -> None:
        with pytest.raises(variants.BadVariant, match="did you mean 'flagos'"):
            variants.choose(["flagoss"], [], plain_cpu=False)

    @pytest.mark.parametrize("text", ["mine", ":A=1", "mine:A", "mine:=1"])
    def test_a_misspelled_one(self, text: str) -> None:
        with pytest.raises(variants.BadVariant, match="NAME:VAR=VALUE"):
            variants.choose(["default"], [text], plain_cpu=False)


class TestSummary:
    def test_intervals_are_counted_over_runs(self) -> None:
        rows = [("off", 0.9, 1.1), ("off", 1.0, 1.2), ("off", 1.01, 1.2), ("default", 0.8, 0.99)]
        run = {"summary": [{"variant": name, "ratio": 1.0, "low": low, "high": high} for name, low, high in rows]}
        run["summary"].append({"variant": "native"})
        found = summary.tally([run, run])
        assert found == {"off": summary.Tally(6, 2, 0), "default": summary.Tally(2, 0, 2)}
        assert str(found["off"]) == "4 of 6 intervals hold 1, 2 lie above it, 0 below (were the speeds equal, 0.3 would miss it by chance)"

    def test_rows(self) -> None:
        seconds = [{"prefill/2": {"a": 2.0, "b": 1.0}}, {"prefill/2": {"a": 4.0, "b": 2.0}}, {"prefill/2": {"a": 3.0}}]
        rows = summary.summarize([{"seconds": s} for s in seconds], ["a", "b", "gone"], "a", {"prefill/2": 60})
        assert rows[0] == {"case": "prefill/2", "variant": "a", "rounds": 3, "seconds": 3.0, "tokens_per_second": 20.0}
        assert rows[1]["ratio"] == pytest.approx(2) and rows[1]["pairs"] == 2 and rows[1]["seconds"] == 1.5
        assert len(rows) == 2

    def test_a_step_that_took_no_time_is_no_ratio(self) -> None:
        rows = summary.summarize([{"seconds": {"decode/1": {"a": 1.0, "b": -0.5}}}], ["a", "b"], "a", {"decode/1": 1})
        assert "ratio" not in rows[1] and rows[1]["tokens_per_second"] is None

    def test_another_baseline(self) -> None:
        rounds = [{"seconds": {"prefill/2": {"a": 2.0, "b": 1.0, "c": 4.0}}}]
        run = {"variants": ["a", "b", "c"], "baseline": "a", "rounds": rounds}
        run["summary"] = summary.summarize(rounds, ["a", "b", "c"], "a", {"prefill/2": 60})
        found = summary.against(run, "b")
        assert found["baseline"] == "b" and [row.get("ratio") for row in found["summary"]] == [0.5, None, 0.25]
        assert [row["tokens_per_second"] for row in found["summary"]] == [30, 60, 15]

    def test_where_two_engines_of_the_baseline_differ_much_only_more_than_that_is_resolved(self) -> None:
        def of(low: float, high: float) -> dict[str, Any]:
            return {"case": "decode/1", "seconds": 0.002, "ratio": 0.9, "low": low, "high": high}

        def cells(again: str, noise: tuple[float, float], interval: tuple[float, float]) -> list[str]:
            rows = [{"case": "decode/1", "seconds": 0.002, "variant": "native"}]
            rows += [{**of(*noise), "variant": again}, {**of(*interval), "variant": "flagos"}]
            run = {"summary": rows, "variants": ["native", again, "flagos"], "baseline": "native", "rounds": [{}], "model": "m"}
            columns = table.speed_table(run | {"machine": {"device": "a device"}}).columns
            return [next(iter(column.cells)).partition("  ")[2] for column in columns][3:]

        assert cells("native-again", (0.85, 0.96), (0.7, 0.86)) == ["0.900 [0.850, 0.960]", "not resolved [0.700, 0.860]"]
        assert cells("native-again", (0.85, 0.96), (0.7, 0.84)) == ["0.900 [0.850, 0.960]", "0.900 [0.700, 0.840]"]
        assert cells("native-again", (0.86, 0.955), (0.7, 0.9))[1] == "0.900 [0.700, 0.900]"
        assert cells("off", (0.5, 1.5), (0.7, 0.9))[1] == "0.900 [0.700, 0.900]"


class TestTokens:
    @staticmethod
    def greedy(tokens_: list[int], second: int, margin: float, noise: float = 0.0) -> dict[str, Any]:
        logprobs = [-2.0 + noise * (-1) ** i for i in range(len(tokens_))]
        top = [[[token, logprob], [second, logprob - margin]] for token, logprob in zip(tokens_, logprobs, strict=True)]
        return {"tokens": tokens_, "logprobs": logprobs, "top": top}

    def test_identical(self) -> None:
        found = tokens.compare(self.greedy([1, 2], 9, 0.1), self.greedy([1, 2], 9, 0.1, noise=0.01))
        assert found["verdict"] == "identical" and found["largest_logprob_difference"] == pytest.approx(0.01)

    @pytest.mark.parametrize(("margin", "verdict"), [(0.0019, "tie within rounding"), (0.0021, "differs")])
    def test_a_margin_within_twice_the_rounding_is_a_tie(self, margin: float, verdict: str) -> None:
        found = tokens.compare(self.greedy([1] * 8 + [5], 6, margin), self.greedy([1] * 8 + [6], 5, margin, noise=0.001))
        assert found["verdict"] == verdict
        assert found["first_difference"] == 8 and found["margin"] == pytest.approx(margin) and found["tokens"] == [5, 6]

    def test_the_spacing_of_fp32_counts_where_nothing_else_differs(self) -> None:
        spacing = float(np.spacing(np.float32(2)))
        pair = [self.greedy([1] * 8 + [token], 11 - token, spacing) for token in (5, 6)]
        assert tokens.compare(*pair)["verdict"] == "tie within rounding"

    def test_a_token_that_the_baseline_did_not_have_second_is_no_tie(self) -> None:
        found = tokens.compare(self.greedy([1] * 8 + [5], 6, 0.0), self.greedy([1] * 8 + [7], 5, 0.0, noise=0.1))
        assert found["verdict"] == "differs" and not found["margin_is_exact"]

    def test_a_short_prefix_shows_no_rounding(self) -> None:
        found = tokens.compare(self.greedy([1, 5], 6, 0.0), self.greedy([1, 6], 5, 0.0))
        assert found["verdict"].startswith("differs (1 common") and found["tolerance"] is None


class TestRounds:
    LENGTHS = served.Lengths(prefill=16, decode=4, output=8)

    def test_no_prompt_begins_like_another_and_none_comes_twice(self) -> None:
        one, two = (served.make_prompts(64, 64, 5, (0, number)) for number in (0, 1))
        assert len({prompt[0] for prompt in one}) == 64 and one != two and one == served.make_prompts(64, 64, 5, (0, 0))

    def test_engines_get_the_same_prompts_in_turning_order(self) -> None:
        log: list[Any] = []
        engines = Engines([Answering("a", 0.1, log), Answering("b", 0.2, log)])  # type: ignore[list-item]
        found = rounds.run_round(engines, 0, [1, 2], self.LENGTHS, 100, seed=0)
        assert found["seconds"]["decode/2"] == {"a": pytest.approx(0.1), "b": pytest.approx(0.2)}
        assert [name for name, asked in log if len(asked["input_ids"][0]) == 16] == ["a", "b", "b", "a"]
        by_name = {name: [asked for n, asked in log if n == name] for name in "ab"}
        assert by_name["a"] == by_name["b"]

    def test_a_prefill_comes_after_a_short_one_of_as_many_other_prompts(self) -> None:
        log: list[Any] = []
        served.Case("prefill", 2).measure(Answering("a", 0.1, log), [[n] * 16 for n in (1, 2, 3, 4)], self.LENGTHS)  # type: ignore[arg-type]
        assert [asked["input_ids"] for _, asked in log] == [[[3] * 4, [4] * 4], [[1] * 16, [2] * 16]]

    def test_before_decode_an_engine_runs_untimed(self) -> None:
        """It was stopped until now."""
        log: list[Any] = []
        found = served.Case("decode", 1).measure(Answering("a", 0.1, log), [[1] * 4, [3] * 4], self.LENGTHS)  # type: ignore[arg-type]
        asked = [(values["input_ids"], values["max_new_tokens"]) for _, values in log]
        assert asked == [([[3] * 4], 8), ([[1] * 4], 8), ([[1] * 4], 16)]
        assert found["seconds"] == pytest.approx(0.1)

    def test_an_engine_that_fails_is_out_and_the_others_go_on(self) -> None:
        log: list[Any] = []
        engines = Engines([Answering("a", 0.1, log), Answering("b", 0.2, log, fails_at=4)])  # type: ignore[list-item]
        found = rounds.run_round(engines, 0, [1], self.LENGTHS, 100, seed=0)
        assert all(set(seconds) == {"a"} for seconds in found["seconds"].values()) and engines.errors == {"b": "b: gone"}

    def test_the_pool_holds_every_measurement(self) -> None:
        assert served.pool_tokens([1, 64], served.Lengths(1024, 64, 64), single=320) >= 64 * 1025
        assert served.pool_tokens([1], served.Lengths(8, 8, 8), single=320) >= 320


def cut_off(out: Path, run: dict[str, Any]) -> None:
    """A run that ends before it comes to its end."""
    found = results.Results(out)
    found.save(run)
    found.close()


class TestResults:
    def test_a_run_that_was_cut_off_is_kept(self, tmp_path: Path) -> None:
        out = tmp_path / "r.jsonl"
        cut_off(out, {"run": 1})
        after = results.Results(out)
        assert after.recovered
        after.finish({"run": 2})
        assert results.read(out) == [{"run": 1}, {"run": 2}] and list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize("there", ["", '{"run": 1}\n', '{"run": 1}\n{"ru', '{"run": 1}\n{"run": 2}\n'])
    def test_a_line_that_was_cut_off_is_written_once(self, tmp_path: Path, there: str) -> None:
        """The process may end before, in the middle of, and after appending."""
        out = tmp_path / "r.jsonl"
        cut_off(out, {"run": 2})
        out.write_text(there)
        results.Results(out)
        assert results.read(out) == [*([{"run": 1}] if '{"run": 1}' in there else []), {"run": 2}], "nothing else is lost"

    def test_two_runs_do_not_share_a_file(self, tmp_path: Path) -> None:
        out = tmp_path / "r.jsonl"
        first = results.Results(out)
        first.save({"run": 1})
        with pytest.raises(BlockingIOError):
            results.Results(out)
        first.finish({"run": 1})
        assert results.read(out) == [{"run": 1}]

    def test_a_line_that_is_no_run_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "r.jsonl").write_text('{"run": 1}\n\n{"run"')
        with pytest.raises(ValueError, match=r"r\.jsonl:3: "):
            results.read(tmp_path / "r.jsonl")

    def test_paths_of_this_machine_are_left_out(self) -> None:
        told = results.without_paths({"errors": [f"File {sys.prefix}/lib/x.py"]})
        assert told == {"errors": ["File <python>/lib/x.py"]}


class TestCommand:
    def refused(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serving.py", *words, "--out", str(tmp_path / "r.jsonl")])
        with pytest.raises(SystemExit) as ended:
            serving.main()
        assert ended.value.code == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["qwen3-9b"], "did you mean 'qwen3-8b'"),
            (["tiny", "--variants", "of"], "did you mean 'off'"),
            (["tiny", "--variants", "off", "--variant", "mine"], "NAME:VAR=VALUE"),
            (["tiny", "--variants", "off", "--engine-arg", "x"], "NAME=VALUE"),
            (["gpt2-xl", "--variants", "off"], "takes 1024 tokens, and a prompt with its output would have 1025"),
            (["tiny", "--variants", "off", "--engine-arg", "x=[1"], "'[1' is no value of YAML"),
            (["tiny", "--variants", "off", "--batch", "0"], "no number above 0"),
            (["tiny", "--variants", "off", "--batch", "1", "1000000"], "do not fit"),
            (["tiny", "--variants", "off", "--tokens", "-5"], "no number from 0 up"),
            (["tiny", "--variants", "off", "--budget", "nan"], "no number of seconds"),
            (["tiny", "--variants", "off", "--budget", "0"], "no number of seconds"),
            (["tiny", "--variants", "off", "--start-timeout", "soon"], "no number of seconds"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_starts(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], told: str
    ) -> None:
        assert told in self.refused(monkeypatch, capsys, tmp_path, *words)

    def test_where_nothing_can_be_written(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """Said before the engines start, and not after an hour."""
        for out, told in ((tmp_path, "directory"), (Path("/proc/nowhere/r.jsonl"), "/proc/nowhere")):
            monkeypatch.setattr(sys, "argv", ["serving.py", "tiny", "--variants", "off", "--out", str(out)])
            with pytest.raises(SystemExit, match="2"):
                serving.main()
            assert told in capsys.readouterr().err

    def test_what_was_measured_is_shown(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        file = Path(serving.__file__).parent / "results" / "serving-nvidia-h200x2.jsonl"
        monkeypatch.setattr(sys, "argv", ["serving.py", "--show", str(file), "--against", "native-no-custom-ar"])
        assert serving.main() == 0
        printed = capsys.readouterr().out
        assert "14 rounds; speed as a multiple of native-no-custom-ar's" in printed
        assert "flagcx-no-custom-ar: 9 of 10 intervals hold 1, 1 lie above it, 0 below" in printed
        (tmp_path / "other").write_text("{}")
        for words, told in (
            (["--show", str(file), "--against", "flagc"], "did you mean 'flagcx'"),
            (["--show", str(tmp_path / "gone")], "gone"),
            (["--show", str(tmp_path / "other")], "other"),
            ([], "which model?"),
        ):
            monkeypatch.setattr(sys, "argv", ["serving.py", *words])
            with pytest.raises(SystemExit, match="2"):
                serving.main()
            assert told in capsys.readouterr().err

    def test_a_run_that_is_ended_is_in_its_file_before_its_engines_end(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Their end may take longer than the time between SIGTERM and SIGKILL."""
        out = tmp_path / "r.jsonl"
        found: list[dict[str, Any]] = []

        def ended(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Engines, "start", ended)
        monkeypatch.setattr(Engines, "__exit__", lambda *_: found.extend(results.read(out)))
        monkeypatch.setattr(sys, "argv", ["serving.py", "tiny", "--variants", "off", "--out", str(out)])
        assert serving.main() == 130
        assert [run["interrupted"] for run in found] == [True] and results.read(out) == found
        assert not results.partial_of(out).exists()

    def test_show_says_where_a_run_is_that_was_killed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        out = tmp_path / "r.jsonl"
        monkeypatch.setattr(sys, "argv", ["serving.py", "--show", str(out)])
        for run, told in ((None, False), ({"variants": {}, "summary": []}, True)):
            found = results.Results(out)
            if run is not None:
                found.save(run)
            found.close()
            assert serving.main() == 0
            assert ("r.jsonl.partial has one more run" in capsys.readouterr().out.replace("\n", "")) == told

    def test_engine_arguments(self, tmp_path: Path) -> None:
        args = serving.parser().parse_args(["tiny", "--engine-arg", "chunked-prefill-size=512", "--engine-arg", "disable_radix_cache=true"])
        found = serving.engine_arguments(args, shapes.load_shape("tiny"), tmp_path, plain_cpu=True)
        assert found["chunked_prefill_size"] == 512 and found["disable_radix_cache"] is True
        assert found["dtype"] == "float32" and found["load_format"] == "dummy" and found["model_path"] == str(tmp_path)

    def test_engines_that_cannot_fit_together_are_refused(self, tmp_path: Path) -> None:
        args = serving.parser().parse_args(["qwen3-8b"])
        shape = shapes.load_shape("qwen3-8b")
        arguments = serving.engine_arguments(args, shape, tmp_path, plain_cpu=False)
        four = variants.choose(["native", "off", "default", "flagos"], [], plain_cpu=False)
        with pytest.raises(ValueError, match=r"4 engines of .* do not fit"):
            serving.refuse_if_too_large(shape, arguments, four, 79.6)
        serving.refuse_if_too_large(shape, arguments, four[:2], 79.6)
        serving.refuse_if_too_large(shape, arguments, four, None)

    def test_engines_of_a_hybrid_get_states_for_each_request(self, tmp_path: Path) -> None:
        """By default SGLang gives them a share of what is free, which engines that start together would fight for."""
        args = serving.parser().parse_args(["qwen3-next-80b-a3b:4", "--batch", "1", "64"])
        shape = shapes.load_shape(args.model)
        arguments = serving.engine_arguments(args, shape, tmp_path, plain_cpu=False)
        assert arguments["max_mamba_cache_size"] == 320
        three = variants.choose(["native", "default", "flagos"], [], plain_cpu=False)
        serving.refuse_if_too_large(shape, arguments, three, 79.6)
        states = serving.least_memory(shape, arguments) - serving.least_memory(shape, {**arguments, "max_mamba_cache_size": 0})
        assert states == pytest.approx(320 * shape.state_bytes() / 2**30)
        assert "max_mamba_cache_size" not in serving.engine_arguments(args, shapes.load_shape("tiny"), tmp_path, plain_cpu=True)
