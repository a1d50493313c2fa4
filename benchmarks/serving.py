#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""SGLang's serving speed with and without sglang-fl, on this machine, in one sitting.

An engine for each variant is started, all of them stay up on the same device, and the measurements alternate
between them; so a ratio is of neighbours in time. While one is measured, the processes of the others are stopped
(SIGSTOP): idle engines poll, and would take cores from it. All have the same PYTHONHASHSEED. Of each variant: prefill
and decode at some batch sizes, start-up and memory, and whether its greedy tokens and (with --profile) the kernels that
it runs and the Python functions that its scheduler calls in a step are the baseline's, which is the first variant. With
--profile also the GPU time of a step: the time in which at least one kernel ran.

    python benchmarks/serving.py qwen3-0.6b                        # a built-in shape, random weights
    python benchmarks/serving.py qwen3-8b:12 --profile             # its first 12 layers
    python benchmarks/serving.py path/to/a/model --variants native,default
    python benchmarks/serving.py tiny --batch 1 2 --input-len 32 --output-len 8 --rounds 3     # on a CPU
    python benchmarks/serving.py qwen3-next-80b-a3b:4 --variants native,default,flagos --engine-arg linear_attn_backend=triton

The last is a hybrid. With no --engine-arg SGLang prefills its linear attention with FlashInfer's kernel on an H100, past
chunk_gated_delta_rule. Three of its engines fit in 80 GB.

Variants: native (SGLang without plugins), off (sglang-fl with every operator left to SGLang), default (sglang-fl
as it comes), flagos, vendor, reference (SGLANG_FL_PREFER), flagcx (collectives over the FlagCX of FLAGCX_PATH), and your
own with --variant. NAME-no-custom-ar is a variant with --disable-custom-all-reduce; NAME-again is a variant a second time:
native,native-again,off says how far apart two engines are that do not differ. Where its interval is wider than ±0.05,
ratios whose interval overlaps it are printed as "not resolved". Runs are lines of JSON in --out; the
engines' logs lie beside it.

    python benchmarks/serving.py qwen3-8b --variants native,flagcx,native-no-custom-ar,flagcx-no-custom-ar --engine-arg tp_size=2
    python benchmarks/serving.py --show benchmarks/results/serving-nvidia-h200x2.jsonl --against native-no-custom-ar
"""

import argparse
import contextlib
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import machine
import psutil
import result_file
import yaml
from arguments import not_negative, positive, seconds
from rich.console import Console
from serving_lib import kernels, python_calls, tokens
from serving_lib.results import Results, partial_of, read
from serving_lib.rounds import run_round
from serving_lib.summary import LEAST_ROUNDS, against, summarize, tally
from serving_lib.table import other_table, speed_table, step_table
from serving_lib.variants import HASH_SEED, BadVariant, Variant, choose, default_names
from shapes import SHAPES, Shape, UnknownShape, load_shape

from sglang_fl.config.errors import suggest
from sglang_fl.device import probe
from sglang_fl.tune.engine import CommandFailed, Engine, Engines
from sglang_fl.tune.served import FIRST_TOKENS, Lengths, cases, make_prompts, pool_tokens
from sglang_fl.utils.signals import interrupt_on_termination

_WARM_UP_ROUNDS = 2
_PROMPT_FOR_TOKENS = 64
_PROFILED_STEPS = 8
_PROFILED_BATCH = 32
_PROFILED_PREFILLS = 5
_MEM_FRACTION_STATIC = 0.9
#: Slots of states that SGLang keeps for a request of a hybrid model, whose snapshots for the prefix cache included.
_STATES_PER_REQUEST = 5
_GIB = 1 << 30
Found = TypeVar("Found")
#: The baseline's, another's -> how they differ.
Comparison = Callable[[Any, Any], dict[str, Any]]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help=f"a model's directory, or a shape: {', '.join(SHAPES)}, or NAME:LAYERS for one cut to so many layers"
    )
    parser.add_argument(
        "--variants", metavar="A,B,…", help="what to compare; the first is the baseline (default: native,off,default,flagos)"
    )
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:VAR=VALUE,…", help="a variant of your own; repeatable")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 32, 64], metavar="N", help="batch sizes (default: 1 32 64)")
    parser.add_argument("--input-len", type=positive, default=1024, metavar="N", help="tokens of a prompt for prefill (default: 1024)")
    parser.add_argument("--decode-input-len", type=positive, default=64, metavar="N", help="tokens of a prompt for decode (default: 64)")
    parser.add_argument("--output-len", type=positive, default=256, metavar="N", help="decode steps that are timed (default: 256)")
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="measured rounds (default: 10)")
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help=f"begin no further round this long after the program's start, once there are {LEAST_ROUNDS}; tokens and kernels come after",
    )
    parser.add_argument("--tokens", type=not_negative, default=256, metavar="N", help="greedy tokens to compare; 0: none (default: 256)")
    parser.add_argument("--profile", action="store_true", help="compare the kernels and Python calls of a step, and its GPU time")
    parser.add_argument("--start", choices=("together", "apart"), default="together", help="apart: one after the other, for start-up times")
    parser.add_argument("--start-timeout", type=seconds, default=900, metavar="SECONDS", help="how long starting may take (default: 900)")
    parser.add_argument("--max-total-tokens", type=positive, metavar="N", help="KV cache of each engine (default: what the run needs)")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of sglang.Engine; repeatable")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of the prompts (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("serving.jsonl"), metavar="FILE", help="results (default: serving.jsonl)")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="measure nothing; print the speeds in such a file, and how many are the baseline's"
    )
    parser.add_argument("--against", metavar="NAME", help="with --show: the variant that speeds are multiples of")
    return parser


def engine_arguments(args: argparse.Namespace, shape: Shape, directory: Path, plain_cpu: bool) -> dict[str, Any]:
    """The arguments of ``sglang.Engine``: its defaults, but for the model and the KV cache's size.

    Raises:
        ValueError: an ``--engine-arg`` is no NAME=VALUE, or the model does not take so many tokens.
    """
    lengths = Lengths(args.input_len, args.decode_input_len, args.output_len)
    single = _PROMPT_FOR_TOKENS + args.tokens
    longest = max(lengths.longest, single)
    context = shape.config.get("max_position_embeddings", longest)
    if longest > context:
        raise ValueError(
            f"{shape.name} takes {context} tokens, and a prompt with its output would have {longest}: "
            "take a smaller --input-len, --decode-input-len, --output-len or --tokens"
        )
    arguments: dict[str, Any] = {
        "model_path": str(shape.write(directory)),
        "skip_tokenizer_init": True,
        "log_level": "info",
        "random_seed": 0,
        "max_total_tokens": args.max_total_tokens or pool_tokens(args.batch, lengths, single),
        "mem_fraction_static": _MEM_FRACTION_STATIC,
    }
    if shape.state_bytes():
        # SGLang's default is a share of the memory that is free, and engines that start together would all take it.
        arguments["max_mamba_cache_size"] = _STATES_PER_REQUEST * max(args.batch)
    if shape.directory is None:
        arguments |= {"load_format": "dummy", "dtype": "float32" if plain_cpu else "bfloat16"}
    if plain_cpu:
        arguments["sleep_on_idle"] = True  # an idle engine would take a core from the busy one
    for text in args.engine_arg:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--engine-arg {text!r}: expected NAME=VALUE")
        try:
            arguments[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--engine-arg {text!r}: {value!r} is no value of YAML: {error}") from None
    return arguments


def least_memory(shape: Shape, arguments: dict[str, Any]) -> float:
    """GiB that an engine holds at the least: weights, KV cache and states; contexts and graphs come on top."""
    if shape.directory is None:
        weights = shape.weight_bytes()
    else:
        weights = sum(path.stat().st_size for path in shape.directory.glob("*.safetensors"))
    states = arguments.get("max_mamba_cache_size", 0) * shape.state_bytes()
    return (weights + arguments["max_total_tokens"] * shape.kv_numbers_per_token() * 2 + states) / _GIB


def refuse_if_too_large(shape: Shape, arguments: dict[str, Any], variants: list[Variant], memory_gib: float | None) -> None:
    """Engines that start together size their KV caches by what is free at that moment.

    SGLang gives the cache what is free after loading, less ``1 - mem_fraction_static`` of what was
    free before. Whatever the others have taken by then, that leaves the asked size as long as all engines
    together need no more than ``mem_fraction_static`` of the device.

    Raises:
        ValueError: they certainly need more.
    """
    if memory_gib is None:
        return
    each, room = least_memory(shape, arguments), memory_gib * arguments["mem_fraction_static"]
    if each * len(variants) > room:
        raise ValueError(
            f"{len(variants)} engines of {each:.1f} GiB (weights and caches alone) do not fit in {room:.1f} GiB. "
            f"Compare fewer variants (--variants), cut the model (NAME:LAYERS), or take smaller --batch or --input-len"
        )


class Run:
    """One sitting: what is asked, the engines, and the results so far, saved as they come."""

    def __init__(
        self, args: argparse.Namespace, shape: Shape, variants: list[Variant], arguments: dict[str, Any], results: Results, console: Console
    ):
        self.args, self.shape, self.variants, self.results, self.console = args, shape, variants, results, console
        self.started = time.perf_counter()
        self._told: set[str] = set()
        self.lengths = Lengths(args.input_len, args.decode_input_len, args.output_len)
        now = datetime.datetime.now(datetime.UTC)
        self.logs = results.path.with_suffix(".logs") / now.strftime("%Y%m%dT%H%M%S")
        self.engines = Engines([variant.engine(arguments, self.logs / variant.name, os.environ) for variant in variants])
        self.data: dict[str, Any] = {
            "date": now.isoformat(timespec="seconds"),
            "command": result_file.command(),
            "model": shape.name,
            "config": shape.config,
            "machine": machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "source": result_file.source_hash(),
            "variants": {variant.name: {**variant.settings, **variant.arguments} for variant in variants},
            "baseline": variants[0].name,
            "engine_arguments": {name: value for name, value in arguments.items() if name != "model_path"},
            "lengths": vars(self.lengths),
            "seed": args.seed,
            "start": args.start,
            "idle_engines": "stopped",
            "hash_seed": HASH_SEED,
            "startup": {},
            "memory": {},
            "device_memory_used_gib": {"before": machine.device_memory_used()},
            "resolved": {},
            "rounds": [],
            "cached_tokens": 0,
            "summary": [],
            "greedy": {},
            "tokens": {},
            "profile": {"stripped": kernels.STRIPPED, "windows": {}},
            "kernels": {},
            "python": {},
            "dispatched": {},
            "errors": self.engines.errors,
            "interrupted": True,  # until it has come to its end
        }

    def execute(self) -> None:
        """Everything, in an order in which what is worth most comes first."""
        with self.engines:
            try:
                self._say(f"starting {', '.join(self.data['variants'])}")
                self.engines.start(apart=self.args.start == "apart", seconds=self.args.start_timeout, on_ready=self._on_ready)
                self.data["device_memory_used_gib"]["ready"] = machine.device_memory_used()
                self._say_errors()
                if self.engines.up:
                    self._measure_and_compare()
                self.data["interrupted"] = False
            finally:
                # Before the engines end: that takes a while, and SIGKILL may follow SIGTERM after some seconds.
                self.keep()
                self.results.finish(self.data)

    def _measure_and_compare(self) -> None:
        if self.data["baseline"] in self.engines.errors:
            self.data["baseline"] = self.engines.up[0].name
            self._say(f"the baseline is {self.data['baseline']}, as {self.variants[0].name} failed")
        self._measure()
        if self.args.tokens:
            self._compare_tokens()
        if self.args.profile:
            self._compare("kernels", self._profile, of_each_window(kernels.compare), self.data["profile"]["windows"])
            self._compare("python", self._profile_python, of_each_window(python_calls.compare), {})
        for engine in self.engines.up:
            self.data["memory"][engine.name]["host_gib_at_end"] = engine.host_memory() / _GIB

    def keep(self) -> None:
        """Save what there is."""
        for engine in self.engines.all:
            self.data["dispatched"][engine.name] = engine.dispatched()
        tokens_of = {str(case): case.tokens(self.lengths) for case in cases(self.args.batch)}
        self.data["summary"] = summarize(self.data["rounds"], list(self.data["variants"]), self.data["baseline"], tokens_of)
        self.data["seconds"] = time.perf_counter() - self.started
        self.results.save(self.data)

    def _on_ready(self, engine: Engine) -> None:
        said = engine.description
        assert said is not None
        held, asked = said["max_total_num_tokens"], self.data["engine_arguments"]["max_total_tokens"]
        self.data["startup"][engine.name] = {"spawn_to_ready": engine.startup_seconds, **said["startup"]}
        self.data["memory"][engine.name] = {
            "device_gib": machine.device_memory_of(engine.pids()),
            "device_used_gib_when_ready": machine.device_memory_used(),
            "host_gib": engine.host_memory() / _GIB,
            "sglang": said["memory"],
            "max_total_num_tokens": said["max_total_num_tokens"],
        }
        self.data["resolved"][engine.name] = said["resolved"]
        self._say(f"{engine.name} is up after {engine.startup_seconds:.1f} s")
        if held is not None and held < asked:
            self._say(f"{engine.name}: its KV cache has {held} tokens instead of {asked}; large batches will wait for room")
        self._say_errors()
        self.keep()

    def _measure(self) -> None:
        vocabulary = self.shape.config["vocab_size"]
        for number in range(_WARM_UP_ROUNDS):
            run_round(self.engines, number, self.args.batch, self.lengths, vocabulary, self.args.seed)
            self._say(f"warm-up round {number + 1} of {_WARM_UP_ROUNDS}")
            self._say_errors()
        for number in range(self.args.rounds):
            over = self.args.budget is not None and time.perf_counter() - self.started > self.args.budget
            if self.data["baseline"] in self.engines.errors or not self.engines.up or (over and number >= LEAST_ROUNDS):
                break
            began = time.perf_counter()
            found = run_round(self.engines, _WARM_UP_ROUNDS + number, self.args.batch, self.lengths, vocabulary, self.args.seed)
            self.data["rounds"].append({"round": number, "seconds": found["seconds"]})
            self.data["cached_tokens"] += found["cached_tokens"]
            self.keep()
            self._say(f"round {number + 1} of {self.args.rounds}, {time.perf_counter() - began:.1f} s")
            self._say_errors()
        if self.data["cached_tokens"]:
            self._say(f"{self.data['cached_tokens']} prompt tokens came from the prefix cache: these times are not of whole prefills")

    def _compare_tokens(self) -> None:
        (prompt,) = make_prompts(self.shape.config["vocab_size"], 1, _PROMPT_FOR_TOKENS, (self.args.seed,))

        def greedy(engine: Engine) -> dict[str, Any]:
            engine.ask("flush")
            return engine.ask("tokens", input_ids=prompt, max_new_tokens=self.args.tokens)

        self._compare("tokens", greedy, tokens.compare, self.data["greedy"])

    def _compare(
        self,
        what: str,
        collect: Callable[[Engine], dict[str, Any]],
        compare: Comparison,
        collected: dict[str, Any],
    ) -> None:
        """Collect something from each engine and compare it with the baseline's, the baseline's own a second time."""
        baseline = self.data["baseline"]
        for engine in [*(e for e in self.engines.up if e.name == baseline), *self.engines.up]:
            if not engine.ready:
                continue
            with self.engines.alone(engine):
                try:
                    found = collect(engine)
                    again = engine.name in collected
                    collected.setdefault(engine.name, found)
                    if baseline not in collected:
                        raise ValueError(f"there is nothing of {baseline} to compare with")
                    if again or engine.name != baseline:
                        self.data[what][engine.name] = compare(collected[baseline], found)
                except (CommandFailed, OSError, ValueError) as error:
                    self.data[what][engine.name] = {"error": f"{type(error).__name__}: {error}"}
                    self._say(f"{what} of {engine.name}: {error}")
            self.keep()
        self._say(f"compared {what}")
        self._say_errors()

    def _profile(self, engine: Engine) -> dict[str, Any]:
        """What ran in the prefill of a prompt, and in decode steps alone and of a batch."""

        def window(batch: int, length: int, max_new_tokens: int) -> kernels.Window:
            return self._trace(engine, [self._prompts(batch, length)], max_new_tokens, kernels.read_window)

        found = {"prefill/1": window(1, self.lengths.prefill, 1).per_step(1)}
        for batch in sorted({1, min(_PROFILED_BATCH, max(self.args.batch)), max(self.args.batch)}):
            short, long = (window(batch, self.lengths.decode, FIRST_TOKENS + more) for more in (0, _PROFILED_STEPS))
            found[f"decode/{batch}"] = (long - short).per_step(_PROFILED_STEPS)
        return found

    def _profile_python(self, engine: Engine) -> dict[str, Any]:
        """What Python calls in the scheduler's process in a prefill and a decode step of one prompt.

        Such traces take seconds, more for a batch, and at batch 1 most of a step's time is the host's.
        """
        prefills = [[prompt] for prompt in self._prompts(_PROFILED_PREFILLS, self.lengths.prefill)]
        prompts = self._prompts(1, self.lengths.decode)
        return {
            "prefill/1": self._trace(engine, prefills, 1, python_calls.prefill_step, python=True),
            "decode/1": self._trace(engine, [prompts], python_calls.DECODE_TOKENS, python_calls.decode_step, python=True),
        }

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        return make_prompts(self.shape.config["vocab_size"], batch, length, (self.args.seed, batch, length))

    def _trace(
        self,
        engine: Engine,
        batches: list[list[list[int]]],
        max_new_tokens: int,
        read: Callable[[Path], Found],
        python: bool = False,
    ) -> Found:
        """What ``read`` finds in a trace of these batches."""
        engine.ask("flush")
        with tempfile.TemporaryDirectory(prefix="sglang-fl-traces-") as directory:
            answer = engine.ask("profile", batches=batches, max_new_tokens=max_new_tokens, directory=directory, python=python)
            return read(Path(answer["trace"]))

    def _say(self, text: str) -> None:
        self.console.print(f"{time.perf_counter() - self.started:6.1f} s  {text}", markup=False, highlight=False)

    def _say_errors(self) -> None:
        for name, error in self.engines.errors.items():
            if name not in self._told:
                self._told.add(name)
                self._say(f"out of the run: {error}")


def of_each_window(compare: Comparison) -> Comparison:
    """The same of windows of steps, each by itself."""
    return lambda ours, theirs: {window: compare(ours[window], theirs[window]) for window in ours}


def print_speeds(run: dict[str, Any], console: Console) -> None:
    console.print(speed_table(run))
    if (steps := step_table(run)) is not None:
        console.print(steps)


def show(file: Path, baseline: str | None, console: Console) -> None:
    """Print the speeds of a file's runs; raises OSError, or ValueError for a file or variant that is none."""
    runs = read(file)
    names = list(dict.fromkeys(name for run in runs for name in run["variants"]))
    if baseline is not None and baseline not in names:
        raise ValueError(f"there is no variant {baseline!r}{suggest(baseline, tuple(names))}; there are {', '.join(names)}")
    shown = [run for run in runs if run["summary"] and (baseline is None or baseline in run["variants"])]
    if baseline is not None:
        shown = [against(run, baseline) for run in shown]
    for run in shown:
        print_speeds(run, console)
    for variant, count in tally(shown).items():
        console.print(f"{variant}: {count}", markup=False, highlight=False)
    if (partial := partial_of(file)).exists():
        console.print(
            f"{partial} has one more run, which goes on or was killed. If it was killed, the next run with --out {file} adds it.",
            markup=False,
            highlight=False,
        )


def main() -> int:
    command = parser()
    args = command.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.show is not None:
        try:
            show(args.show, args.against, console)
        except (OSError, ValueError, KeyError, TypeError) as error:
            command.error(f"--show {args.show}: {error}")
        return 0
    if args.model is None:
        command.error("which model? a directory, or a shape: " + ", ".join(SHAPES))
    plain_cpu = probe().device_type == "cpu"
    with contextlib.ExitStack() as leftovers:
        directory = Path(leftovers.enter_context(tempfile.TemporaryDirectory(prefix="sglang-fl-shape-")))
        try:
            names = args.variants.split(",") if args.variants else default_names(plain_cpu)
            variants = choose(names, args.variant, plain_cpu)
            shape = load_shape(args.model)
            arguments = engine_arguments(args, shape, directory, plain_cpu)
            memory = psutil.virtual_memory().total / _GIB if plain_cpu else machine.machine()["memory_gib"]
            refuse_if_too_large(shape, arguments, variants, memory)
        except (BadVariant, UnknownShape, ValueError) as error:
            command.error(str(error))
        try:
            results = Results(args.out)
        except BlockingIOError:
            command.error(f"--out {args.out}: another run writes to it; give this one a file of its own")
        except (OSError, ValueError) as error:
            command.error(f"--out {args.out}: {error}")
        if results.recovered:
            console.print("The run before this one was cut off; what it had is in the results.", markup=False)
        run = Run(args, shape, variants, arguments, results, console)
        try:
            with interrupt_on_termination():
                run.execute()
        except KeyboardInterrupt:
            console.print("Interrupted.")
        finally:
            results.close()
    if run.data["summary"]:
        print_speeds(run.data, console)
    if run.data["startup"]:
        console.print(other_table(run.data))
    for name, told in run.data["errors"].items():
        console.print(f"{name} failed: {told.splitlines()[0]}", markup=False, style="red")
    failed = any("error" in found for what in ("tokens", "kernels", "python") for found in run.data[what].values())
    return 130 if run.data["interrupted"] else 1 if run.data["errors"] or failed else 0


if __name__ == "__main__":
    sys.exit(main())
