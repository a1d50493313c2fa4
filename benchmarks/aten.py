#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""FlagGems's ATen functions against PyTorch's own, on the calls that serving makes.

    # which calls a served model makes: a model's directory, or a shape of shapes.py
    python benchmarks/aten.py record qwen3-0.6b --out benchmarks/results/calls-qwen3-0.6b.json
    # of these, what FlagGems has a function for: is it right, does it go into a graph, what does it cost
    python benchmarks/aten.py measure benchmarks/results/calls-*.json --out benchmarks/results/aten-nvidia-h100.json

``record`` needs whatever the model needs to be served; ``measure`` a device that FlagGems serves. In a row of
``measure``'s file, ``us`` is the time in a graph and ``host_us`` the host's part of an eager call, ``own_us``
and ``own_host_us`` PyTorch's; the ratios are (median, low, high) of FlagGems's time over PyTorch's, with a
95 % interval. ``seen_eager`` and ``seen_captured`` say how often the recorded models called the operator,
whatever the arguments.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import result_file
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_HERE = Path(__file__).resolve().parent
#: Signatures of one operator that are kept in a recording, and that are measured.
_KEPT, _MEASURED = 12, 5
_START_SECONDS = 120
_POOL_TOKENS = 32768
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int32": "i32", "int64": "i64"}

Row = dict[str, Any]


# Recording


def record(model: str, out: Path) -> None:
    """Serve a model, left to SGLang as it is, and write which ATen calls it made."""
    from shapes import load_shape

    from sglang_fl.dispatch.ops import OPERATORS

    shape = load_shape(model)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "calls.json"
        os.environ |= {
            "USE_FLAGGEMS": "0",
            "SGLANG_FL_PER_OP": ";".join(f"{op}=sglang" for op in OPERATORS),
            "SGLANG_FL_PLUGIN_MODULES": "record_aten",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_HERE), os.environ.get("PYTHONPATH")))),
            "BENCH_ATEN_FILE": str(raw),
        }
        import torch

        os.environ.setdefault("BENCH_ATEN_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
        import sglang

        engine = sglang.Engine(
            model_path=str(shape.write(Path(scratch) / "model")),
            load_format="auto" if shape.directory else "dummy",
            skip_tokenizer_init=True,
            random_seed=0,
            # Room on the device for the recording of other models at the same time.
            max_total_tokens=_POOL_TOKENS,
            mem_fraction_static=0.9,
        )
        try:
            _requests(engine, shape.config["vocab_size"], _context(shape.config))
            time.sleep(2)  # the recorder writes every second
        finally:
            engine.shutdown()
        calls = json.loads(raw.read_text())
    if not calls:
        raise SystemExit(f"{model} was served, and no ATen call was recorded")
    rows = condense(calls, _KEPT)
    result_file.write(out, result_file.header(model=model, device=os.environ["BENCH_ATEN_DEVICE"]), rows)
    print(f"{out}: {len({row['key'] for row in rows})} operators, {sum(c['eager'] + c['captured'] for c in calls)} calls")


def _context(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or 2048)


def _requests(engine: Any, vocabulary: int, context: int) -> None:
    """Prefill, decode and sampling, greedy and not, alone and in batches, with and without logprobs."""
    rng = random.Random(0)

    def prompts(*lengths: int) -> list[list[int]]:
        return [[rng.randrange(3, vocabulary) for _ in range(min(length, context // 2))] for length in lengths]

    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "max_new_tokens": 12, "ignore_eos": True}
    greedy = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    engine.generate(input_ids=prompts(7), sampling_params=greedy)
    again = prompts(200)
    for _ in range(2):  # the second time most of the prompt is in the cache
        engine.generate(input_ids=again, sampling_params=greedy)
    engine.generate(input_ids=prompts(*range(20, 660, 40)), sampling_params=greedy)
    engine.generate(input_ids=prompts(16), sampling_params=sampled)
    engine.generate(input_ids=prompts(*range(30, 350, 20)), sampling_params=sampled)
    mixed = [greedy, sampled, sampled | {"min_p": 0.05}, sampled | {"frequency_penalty": 0.5, "presence_penalty": 0.5}]
    engine.generate(input_ids=prompts(50, 60, 70, 80), sampling_params=mixed)
    engine.generate(input_ids=prompts(40, 50), sampling_params=sampled, return_logprob=True, top_logprobs_num=2)
    engine.generate(input_ids=prompts(4000), sampling_params=greedy)


def condense(calls: Iterable[Mapping[str, Any]], at_most: int) -> list[Row]:
    """A row for each signature that stays; of every operator, the most telling ones.

    Each combination of ranks, dtypes and layouts is stood for by its largest, smallest and middle call.
    ``seen_eager`` and ``seen_captured`` count all calls of the operator.
    """
    by_key: dict[str, dict[str, Mapping[str, Any]]] = {}
    seen: dict[str, list[int]] = {}
    for call in calls:
        by_key.setdefault(call["key"], {})[json.dumps([call["args"], call["kwargs"]])] = call
        totals = seen.setdefault(call["key"], [0, 0])
        totals[0] += call["eager"]
        totals[1] += call["captured"]
    rows: list[Row] = []
    for key, signatures in sorted(by_key.items()):
        eager, captured = seen[key]
        for call in _telling(list(signatures.values()), at_most):
            rows.append({"key": key, "args": call["args"], "kwargs": call["kwargs"], "seen_eager": eager, "seen_captured": captured})
    return rows


def _telling(calls: Sequence[Mapping[str, Any]], at_most: int) -> list[Mapping[str, Any]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for call in calls:
        kinds.setdefault(json.dumps([_kind(call["args"]), _kind(call["kwargs"])]), []).append(call)
    groups = []
    for kind in sorted(kinds, key=lambda k: (-len(kinds[k]), k)):
        ordered = sorted(kinds[kind], key=lambda call: (_numel(call), json.dumps([call["args"], call["kwargs"]])))
        groups.append([ordered[i] for i in dict.fromkeys((len(ordered) - 1, 0, len(ordered) // 2))])
    chosen = [group[turn] for turn in range(3) for group in groups if turn < len(group)]
    return chosen[:at_most]


def _kind(spec: Any) -> Any:
    """What calls of one kind have in common: everything but sizes and values."""
    if isinstance(spec, list):
        # A shape is a list of numbers; of a list of tensors the length matters.
        return [_kind(item) for item in spec] if any(isinstance(item, dict | list) for item in spec) else ["values"]
    if isinstance(spec, dict) and "shape" in spec:
        return [len(spec["shape"]), spec["dtype"], spec["device"], _contiguous(spec)]
    if isinstance(spec, dict):
        return {name: _kind(item) for name, item in spec.items()}
    return spec if isinstance(spec, str) else type(spec).__name__


def _tensors(spec: Any) -> list[Mapping[str, Any]]:
    if isinstance(spec, list):
        return [tensor for item in spec for tensor in _tensors(item)]
    if isinstance(spec, dict):
        return [spec] if "shape" in spec else [tensor for item in spec.values() for tensor in _tensors(item)]
    return []


def _numel(call: Mapping[str, Any]) -> int:
    total = 0
    for tensor in _tensors([call["args"], call["kwargs"]]):
        numel = 1
        for size in tensor["shape"]:
            numel *= size
        total += numel
    return total


def _contiguous(tensor: Mapping[str, Any]) -> bool:
    expected = 1
    for size, step in reversed(list(zip(tensor["shape"], tensor["stride"], strict=True))):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call's arguments for a reader: ``16x1024 bf16, 2.0``."""

    def one(spec: Any) -> str:
        if isinstance(spec, list):
            return f"[{', '.join(map(one, spec))}]"
        if isinstance(spec, dict) and "shape" in spec:
            shape = "x".join(map(str, spec["shape"])) or "scalar"
            where = " on the host" if spec["device"] == "cpu" else ""
            return f"{shape} {_SHORT.get(spec['dtype'], spec['dtype'])}{'' if _contiguous(spec) else ' strided'}{where}"
        if isinstance(spec, dict):
            return next(iter(map(str, spec.values())))
        return str(spec)

    named = [f"{name}={one(spec)}" for name, spec in kwargs.items() if name not in ("device", "layout", "pin_memory")]
    return ", ".join([*map(one, args), *named])


# Measuring


class CaseFailed(RuntimeError):
    """A case ended its process, or took too long. The message says which."""


class CannotStart(CaseFailed):
    """No process can be started that measures. The message says why."""


class Child:
    """A process of ``aten_cases.py``, started when it is needed and again after it ended."""

    def __init__(self, log: Path):
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._replies = -1
        self._unread = b""

    def ask(self, request: Mapping[str, Any], seconds: float, found: Row) -> None:
        """Put into ``found`` what the process replies to a case.

        Raises:
            CaseFailed: it ended or did not reply in time.
            CannotStart: there is none.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self.stop()
            raise CaseFailed(f"its process could not be reached: {error}") from error
        found |= self._reply(deadline)
        if found["function"] is not None:
            found |= self._reply(deadline)
            if found.pop("lost"):
                self.stop()

    def _start(self) -> None:
        self._replies, theirs = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_HERE / "aten_cases.py"), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                pass_fds=(theirs,),
            )
        os.close(theirs)
        self._unread = b""
        try:
            self._reply(time.monotonic() + _START_SECONDS)
        except CaseFailed as error:
            raise CannotStart(f"no process could be started that measures: {error}") from None

    def _reply(self, deadline: float) -> Row:
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise CaseFailed("it took too long")
            data = os.read(self._replies, 1 << 16)
            if not data:
                assert self._process is not None
                code = self._process.wait()
                self.stop()
                raise CaseFailed(f"it ended its process (exit code {code}): {self._last_line()}")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        return dict(json.loads(line))

    def _last_line(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "it printed nothing"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):  # what could not be written any more
                    self._process.stdin.close()
            os.close(self._replies)
            self._process = None


@dataclass
class Measurement:
    """The rows to fill, and how."""

    rows: list[Row]
    log: Path
    case_seconds: float
    deadline: float
    rounds: int
    save: Callable[[], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    why_none: str = ""

    def stage(self, steps: Sequence[str], rows: Sequence[Row], jobs: int, advance: Callable[[Row], None]) -> None:
        """Have every row checked, timed, or one after the other, by that many processes."""
        todo: queue.SimpleQueue[Row] = queue.SimpleQueue()
        for row in rows:
            todo.put(row)
        threads = [threading.Thread(target=self._work, args=(steps, todo, jobs == 1, i, advance)) for i in range(min(jobs, len(rows)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not todo.empty():  # no process was left
            row = todo.get()
            row |= {"error": self.why_none, "later": False}

    def _work(self, steps: Sequence[str], todo: "queue.SimpleQueue[Row]", alone: bool, number: int, advance: Callable[[Row], None]) -> None:
        child = Child(self.log.with_suffix(f".{number}.log"))
        try:
            while True:
                try:
                    row = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    for step in steps:
                        if step == "check" or _worth_timing(row):
                            self._ask(child, step, row, alone)
                except CannotStart as error:
                    # The other processes, if there are any, take the rest.
                    self.why_none = str(error)
                    todo.put(row)
                    return
                advance(row)
        finally:
            child.stop()

    def _ask(self, child: Child, step: str, row: Row, alone: bool) -> None:
        found: Row = {}
        left = self.deadline - time.monotonic()
        if left <= 0:
            found["error"] = "it was not measured: the time was used up"
        else:
            request = {name: row[name] for name in ("key", "args", "kwargs")}
            request |= {"do": step, "alone": alone, "graphs": row.get("graph_safe") is not None, "rounds": self.rounds}
            try:
                child.ask(request, min(left, self.case_seconds), found)
            except CannotStart:
                raise
            except CaseFailed as error:
                found["error"] = str(error) if left > self.case_seconds else f"{error}: the time was used up"
        with self.lock:
            row["later"] = found.pop("later", False)
            row |= found
            self.save()


def measure(recordings: Sequence[Path], out: Path, budget: float, case_seconds: float, jobs: int, rounds: int, console: Console) -> None:
    started = time.monotonic()
    recorded = [result_file.read(path) for path in recordings]
    rows = merged([recording["rows"] for recording in recorded])
    head = result_file.header(models=[recording["model"] for recording in recorded])
    if head["machine"]["gpu"] is None:
        raise SystemExit("There is no CUDA device here, and FlagGems's functions run on nothing else: measure on a machine with a GPU")
    # One signature of every operator before the second of any: what the time does not suffice for is spread.
    turns: dict[str, int] = {}
    for row in rows:
        row["turn"] = turns[row["key"]] = turns.get(row["key"], -1) + 1
    ordered = sorted(rows, key=lambda row: row.pop("turn"))
    saved = 0.0

    def save(*, final: bool = False) -> None:
        nonlocal saved
        if final or time.monotonic() - saved > 2:
            saved = time.monotonic()
            result_file.write(out, head | keys_without_rows(rows), public(rows))

    out.parent.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(ordered, out.with_suffix(".child"), case_seconds, started + budget, rounds, save)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def stage(what: str, steps: Sequence[str], chosen: Sequence[Row], jobs: int) -> None:
            task = progress.add_task(what, total=len(chosen))
            measurement.stage(steps, chosen, jobs, lambda row: progress.update(task, description=f"{what} {row['key']}", advance=1))
            progress.update(task, description=what)

        stage("checking", ("check",), ordered, jobs)
        stage("timing", ("time",), [row for row in ordered if _worth_timing(row)], 1)
        # Kernels that are tuned on their first call, which takes long.
        stage("tuned kernels", ("check", "time"), [row for row in ordered if row["later"]], 1)
    save(final=True)
    for path in out.parent.glob(f"{out.stem}.*.log"):
        path.unlink()
    shown = public(rows)
    console.print(f"{head['machine']['gpu']}; the calls of {', '.join(head['models'])}; {time.monotonic() - started:.0f} s")
    console.print(table(shown))
    left_out = keys_without_rows(rows)
    console.print(f"FlagGems has no function for {len(left_out['without_function'])} of the operators that were called")
    for key, error in left_out["not_measured"].items():
        console.print(f"{key}: {error}", markup=False)


def merged(recordings: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of several recordings as those of one; an operator's counts are added up."""
    totals: dict[str, list[int]] = {}
    calls: list[Row] = []
    for recording in recordings:
        for key, eager, captured in {(row["key"], row["seen_eager"], row["seen_captured"]) for row in recording}:
            before = totals.setdefault(key, [0, 0])
            before[0] += eager
            before[1] += captured
        calls += [row | {"eager": 0, "captured": 0} for row in recording]
    return [row | dict(zip(("seen_eager", "seen_captured"), totals[row["key"]], strict=True)) for row in condense(calls, _MEASURED)]


def public(rows: Sequence[Row]) -> list[Row]:
    """The rows of operators that FlagGems has a function for, as they are written."""
    functions = {row["key"]: row["function"] for row in rows if row.get("function")}
    shown = []
    for row in rows:
        if row["key"] in functions:
            found = {name: value for name, value in row.items() if name not in ("args", "kwargs", "later", "turn")}
            shown.append({"key": row["key"], "function": functions[row["key"]], "call": describe(row["args"], row["kwargs"])} | found)
    return shown


def keys_without_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Operators that FlagGems has no function for, and those that it was not asked about, with the reason."""
    known = {row["key"]: row.get("function", "") for row in rows if row.get("function", "") != "" or "error" not in row}
    return {
        "without_function": sorted(key for key, function in known.items() if function is None),
        "not_measured": {row["key"]: row["error"] for row in rows if row["key"] not in known},
    }


def _worth_timing(row: Row) -> bool:
    return (
        bool(row.get("function"))
        and not row["later"]
        and not row.get("error")
        and row.get("right") is not False
        and row.get("graph_safe") is not False
    )


def table(rows: Sequence[Row]) -> Table:
    """One line for each function: the worst of what was measured."""
    shown = Table(title="FlagGems's functions: time over PyTorch's own, from best to worst call", title_justify="left")
    for column in ("function", "calls", "right", "in graphs", "in a graph", "on the host", "seen eager", "seen captured"):
        shown.add_column(column, justify="left" if column == "function" else "right")
    for name in sorted({row["function"] for row in rows}):
        mine = [row for row in rows if row["function"] == name]
        seen = {row["key"]: (row["seen_eager"], row["seen_captured"]) for row in mine}
        shown.add_row(
            name,
            str(len(mine)),
            _verdict(mine, "right"),
            _verdict(mine, "graph_safe"),
            _span(mine, "ratio"),
            _span(mine, "host_ratio"),
            str(sum(eager for eager, _ in seen.values())),
            str(sum(captured for _, captured in seen.values())),
        )
    return shown


def _verdict(rows: Sequence[Row], name: str) -> str:
    if any(row.get("error") for row in rows):
        return "failed"
    found = {row.get(name) for row in rows}
    return "no" if False in found else "yes" if found == {True} else "not known"


def _span(rows: Sequence[Row], name: str) -> str:
    found = [row[name][0] for row in rows if row.get(name)]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="which ATen calls a served model makes")
    recording.add_argument("model", help="a model's directory, or the name of a shape of shapes.py")
    recording.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    measuring = commands.add_parser("measure", help="FlagGems's functions on recorded calls")
    measuring.add_argument("recorded", nargs="+", type=Path, metavar="RECORDED.json")
    measuring.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    measuring.add_argument("--budget", type=float, default=900, metavar="SECONDS", help="what is not measured by then is not measured")
    measuring.add_argument(
        "--case-seconds", type=float, default=90, metavar="SECONDS", help="the most that one call may take, compiling included"
    )
    measuring.add_argument(
        "--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="processes that compile and check at once"
    )
    measuring.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if args.command == "record":
        record(args.model, args.out)
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        measure(args.recorded, args.out, args.budget, args.case_seconds, args.jobs, args.rounds, console)


if __name__ == "__main__":
    main()
