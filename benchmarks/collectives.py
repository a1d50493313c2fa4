#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Latency and bus bandwidth of collectives: FlagCX as SGLang gets it, SGLang's own NCCL communicator, torch.distributed.

    FLAGCX_PATH=/path/to/FlagCX NCCL_NVLS_ENABLE=0 python benchmarks/collectives.py --out collectives.json
    FLAGCX_PATH=… python benchmarks/collectives.py --ops all_reduce --sizes 8K 1M 64M --rounds 30
    FLAGCX_PATH=… python benchmarks/collectives.py --device cpu --ranks 2 --sizes 1K 64K        # the tests' stand-in
    python benchmarks/collectives.py --show benchmarks/results/collectives-nvidia-h200x2.json   # the tables of a run

Candidates: pynccl (PyNcclCommunicator, the baseline), flagcx (CommunicatorFL), flagcx-torch (the torch.distributed backend
flagcx), torch (torch.distributed's NCCL); on a CPU torch (gloo, the baseline) and the two of FlagCX. Of each: microseconds
per call, and the bus bandwidth in GB/s, which is the bytes of --sizes over the time, times what the operation must move
over a link (all_reduce 2(n-1)/n, all_gather, reduce_scatter and all_to_all (n-1)/n, broadcast and send_recv 1; the
convention of nccl-tests, whose size of an all_gather is that of its output). bf16, in CUDA graphs and called one by one.
Candidates take turns, forth and back; a round's time is that of the slowest rank, after a call that is not timed; ratios to
the baseline are medians of the rounds' ratios with 95 % bootstrap intervals; their geometric means over operations and
sizes come last. Before they are timed, all candidates' results are compared.
"""

import argparse
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import result_file
import torch
import torch.distributed as dist
import torch.multiprocessing
from arguments import positive
from rich.console import Console
from rich.table import Table

from sglang_fl.dispatch.logger_manager import why_unwritable
from sglang_fl.distributed.device_communicators.flagcx_files import FlagCXError, find_library
from sglang_fl.tune.timing import first_error, paired_ratio, rounds_of
from sglang_fl.utils.server import free_port
from sglang_fl.utils.signals import interrupt_on_termination

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")
_SIZES = ("1K", "4K", "16K", "64K", "256K", "1M", "4M", "16M", "64M", "256M")
#: A timing lasts about so long, in microseconds, but has at most so many calls.
_LEAST_US, _MOST_CALLS = 10_000.0, 200
_KEPT_VARIABLES = ("NCCL_", "FLAGCX_")
#: A path is no part of the results, and a container's NCCL_VERSION not that of the NCCL that runs.
_LEFT_OUT = ("FLAGCX_PATH", "NCCL_VERSION")
_PR_SET_PDEATHSIG = 1


def parse_size(text: str) -> int:
    """Bytes, as 512, 8K, 1M or 2G."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    number = text[:-1] if unit else text
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected bytes, as 512, 8K or 1M")
    return int(number) << unit


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--ranks", type=positive, metavar="N", help="processes, one a GPU (default: all GPUs; 2 on a CPU)")
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="OP", help=f"default: {' '.join(OPERATIONS)}")
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, default=[parse_size(s) for s in _SIZES], metavar="SIZE", help="default: 1K to 256M"
    )
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="timings of each candidate (default: 15)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results; an interrupted run's, too")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing; print the tables of such a file")
    return parser


def bus_factor(operation: str, ranks: int) -> float:
    """What a link carries, as a multiple of the size."""
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return 1.0 if operation in ("broadcast", "send_recv") else (ranks - 1) / ranks


class Buffers:
    """The tensors of one operation and size; ``size`` bytes is the larger of input and output."""

    def __init__(self, operation: str, size: int, ranks: int, device: torch.device):
        elements = max(ranks, size // 2 // ranks * ranks)
        self.bytes = elements * 2
        share = elements // ranks
        given = share if operation == "all_gather" else elements
        taken = share if operation == "reduce_scatter" else elements
        self.given = torch.empty(given, dtype=torch.bfloat16, device=device)
        self.taken = torch.empty(taken, dtype=torch.bfloat16, device=device)

    def fill(self, rank: int) -> None:
        self.given.copy_(torch.arange(self.given.numel(), device=self.given.device) % 5 + rank)
        self.taken.zero_()


def by_communicator(communicator: Any, operation: str, b: Buffers, rank: int, ranks: int) -> Callable[[], Any]:
    """An operation as GroupCoordinator calls it on its device communicator."""
    after, before = (rank + 1) % ranks, (rank - 1) % ranks

    def send_recv() -> None:
        communicator.group_start()
        communicator.send(b.given, after)
        communicator.recv(b.taken, before)
        communicator.group_end()

    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: communicator.outplace_all_reduce(b.given, b.taken),
        "all_gather": lambda: communicator.all_gather(b.taken, b.given),
        "reduce_scatter": lambda: communicator.reduce_scatter(b.taken, b.given),
        "all_to_all": lambda: communicator.all_to_all_single(b.taken, b.given),
        "broadcast": lambda: communicator.broadcast(b.given, 0),
        "send_recv": send_recv,
    }
    return calls[operation]


def by_torch(group: Any, operation: str, b: Buffers, rank: int, ranks: int) -> Callable[[], Any]:
    """The same through torch.distributed; its all_reduce is in place."""
    after, before = (rank + 1) % ranks, (rank - 1) % ranks

    def send_recv() -> None:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, b.given, after, group=group), dist.P2POp(dist.irecv, b.taken, before, group=group)]
        )
        for work in works:
            work.wait()

    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(b.taken, group=group),
        "all_gather": lambda: dist.all_gather_single(b.taken, b.given, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_single(b.taken, b.given, group=group),
        "all_to_all": lambda: dist.all_to_all_single(b.taken, b.given, group=group),
        "broadcast": lambda: dist.broadcast(b.given, 0, group=group),
        "send_recv": send_recv,
    }
    return calls[operation]


class Rank:
    """One process of the benchmark, with every candidate's group up."""

    def __init__(self, rank: int, ranks: int, device_type: str, port: int):
        from sglang_fl.config import load_settings
        from sglang_fl.distributed.setup import FlagCXSetup

        self.rank, self.ranks = rank, ranks
        self.device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
        if device_type == "cuda":
            torch.cuda.set_device(self.device)
        native = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
        # By the environment alone, and strict: a fallback would be timed as FlagCX.
        environ = {name: os.environ[name] for name in ("FLAGCX_PATH", "LD_LIBRARY_PATH") if name in os.environ}
        settings = load_settings({**environ, "SGLANG_FL_DIST_BACKEND": "flagcx", "SGLANG_FL_STRICT": "1"})
        setup = FlagCXSetup(settings, device_type, native)
        setup.register_backend()
        everyone = list(range(ranks))
        flagcx = dist.new_group(everyone, backend="flagcx")
        self.version = str(setup.version)
        self.candidates: dict[str, Callable[..., Callable[[], Any]]] = {}
        if device_type == "cuda":
            from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator

            pynccl = PyNcclCommunicator(group=dist.new_group(everyone, backend="gloo"), device=self.device)
            pynccl.disabled = False
            self.candidates["pynccl"] = lambda *about: by_communicator(pynccl, *about)
        torch_group = dist.new_group(everyone, backend=native)
        communicator = setup.communicator(flagcx, self.device)
        self.candidates["torch"] = lambda *about: by_torch(torch_group, *about)
        self.candidates["flagcx"] = lambda *about: by_communicator(communicator, *about)
        self.candidates["flagcx-torch"] = lambda *about: by_torch(flagcx, *about)

    def measure(self, operation: str, size: int, rounds: int) -> list[dict[str, Any]]:
        """Rows of an operation and size, one for each mode and candidate."""
        b = Buffers(operation, size, self.ranks, self.device)
        calls = {name: make(operation, b, self.rank, self.ranks) for name, make in self.candidates.items()}
        self._compare_results(operation, b, calls)
        rows = []
        for mode in ("graph", "eager") if self.device.type == "cuda" else ("eager",):
            count = self._count(next(iter(calls.values())))
            timers, errors = self._timers(calls, count, mode)
            times = rounds_of({name: partial(self._slowest, timer) for name, timer in timers.items()}, rounds)
            baseline = times.get(next(iter(calls)))
            for name in calls:
                row = {"op": operation, "bytes": b.bytes, "mode": mode, "candidate": name, "error": errors.get(name)}
                if name in times:
                    us = float(np.median(times[name]))
                    row |= {"us": us, "bus_gb_s": b.bytes * bus_factor(operation, self.ranks) / us / 1000}
                    row["speed"] = None if baseline is None else paired_ratio(baseline, times[name])
                    row["rounds_us"] = times[name].tolist()
                rows.append(row)
        return rows

    def _compare_results(self, operation: str, b: Buffers, calls: dict[str, Callable[[], Any]]) -> None:
        expected: torch.Tensor | None = None
        for name, call in calls.items():
            b.fill(self.rank)
            if operation == "all_reduce":
                b.taken.copy_(b.given)
            call()
            self._synchronize()
            found = (b.given if operation == "broadcast" else b.taken).clone()
            if expected is not None and not torch.equal(expected, found):
                raise RuntimeError(
                    f"{operation} of {b.bytes} bytes: {name} has other results than {next(iter(calls))}, on rank {self.rank}"
                )
            expected = found

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _count(self, call: Callable[[], Any]) -> int:
        """How many calls a timing has; the same on all ranks."""
        us = torch.tensor([self._run(call, lambda: [call() for _ in range(5)]) / 5])
        dist.all_reduce(us, op=dist.ReduceOp.MAX)
        return max(3, min(_MOST_CALLS, math.ceil(_LEAST_US / us.item())))

    def _timers(self, calls: dict[str, Callable[[], Any]], count: int, mode: str) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
        """What times each candidate, and why one cannot be; that fails on all ranks alike."""
        timers, errors = {}, {}
        for name, call in calls.items():
            try:
                timers[name] = self._timer(call, count, mode)
            except RuntimeError as error:
                errors[name] = first_error(error)
        return timers, errors

    def _timer(self, call: Callable[[], Any], count: int, mode: str) -> Callable[[], float]:
        """What gives microseconds a call."""
        if mode == "eager":
            return lambda: self._run(call, lambda: [call() for _ in range(count)]) / count
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return lambda: self._run(call, graph.replay) / count

    def _run(self, call: Callable[[], Any], work: Callable[[], Any]) -> float:
        """Microseconds that ``work`` takes after a call that is not timed: it waits for all ranks, and wakes their links."""
        self._synchronize()
        dist.barrier()
        call()
        if self.device.type == "cpu":
            started = time.perf_counter()
            work()
            return 1e6 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    def _slowest(self, timer: Callable[[], float]) -> float:
        us = torch.tensor([timer()], dtype=torch.float64)
        dist.all_reduce(us, op=dist.ReduceOp.MAX)
        return us.item()


def run_rank(rank: int, ranks: int, port: int, args: argparse.Namespace, rows: Any) -> None:
    """The body of each process; rank 0 hands rows on as they come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it through the first process, and so does that one's end:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    this = Rank(rank, ranks, args.device, port)
    if rank == 0:
        rows.put(this.version)
    for operation in args.ops:
        for size in args.sizes:
            found = this.measure(operation, size, args.rounds)
            if rank == 0:
                rows.put(found)
    if args.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


@dataclass
class Measured:
    """What there is of a run so far."""

    version: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def collect(args: argparse.Namespace, ranks: int, console: Console, measured: Measured) -> None:
    """Start the ranks, and gather what they measure. Raises what one of them raised."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = time.perf_counter()
    running = torch.multiprocessing.spawn(run_rank, (ranks, free_port(), args, queue), ranks, join=False)
    try:
        expected, done = len(args.ops) * len(args.sizes), 0
        while done < expected or not measured.version:
            if running.join(timeout=0.05) and queue.empty():
                break
            while not queue.empty():
                got = queue.get()
                if isinstance(got, str):
                    measured.version = got
                    continue
                done += 1
                measured.rows += got
                console.print(f"{time.perf_counter() - started:6.1f} s  {got[0]['op']} of {got[0]['bytes']} bytes", highlight=False)
        while not running.join():
            pass
    except KeyboardInterrupt:
        for process in running.processes:
            process.kill()
        raise


def table(rows: Sequence[dict[str, Any]], mode: str) -> Table:
    """Rows of a mode, a column for each candidate."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    found = Table(title=f"{mode}: µs, bus GB/s, speed against {names[0]}", title_justify="left")
    for column in ("operation", "bytes", *names):
        found.add_column(column, justify="right")
    cells = {(row["op"], row["bytes"], row["candidate"]): row for row in rows if row["mode"] == mode}
    for operation, size in dict.fromkeys((row["op"], row["bytes"]) for row in rows):
        shown = []
        for name in names:
            row = cells[operation, size, name]
            if row.get("error") is not None:
                shown.append(row["error"])
                continue
            ratio = ""
            if name != names[0] and row.get("speed") is not None:
                median, low, high = row["speed"]
                ratio = f"  {median:.3f} [{low:.3f}, {high:.3f}]"
            shown.append(f"{row['us']:.1f}  {row['bus_gb_s']:.1f}{ratio}")
        found.add_row(operation, str(size), *shown)
    return found


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """The geometric means of the speeds over operations and sizes, which are taken for as many independent samples."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    found = Table(title=f"speed against {names[0]}: geometric mean over operations and sizes [95 %]", title_justify="left")
    for column in ("", *names[1:]):
        found.add_column(column, justify="right")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for told, is_large in (("up to 1 MiB", False), ("above 1 MiB", True)):
            cells = []
            for name in names[1:]:
                logs = [
                    math.log(row["speed"][0])
                    for row in rows
                    if (row["mode"], row["candidate"], row["bytes"] > 1 << 20) == (mode, name, is_large) and row.get("speed") is not None
                ]
                cells.append(_mean_and_interval(logs))
            found.add_row(f"{mode}, {told}", *cells)
    return found


def _mean_and_interval(logs: Sequence[float]) -> str:
    if len(logs) < 2:
        return f"{math.exp(logs[0]):.3f}" if logs else ""
    mean, half = np.mean(logs), 1.96 * np.std(logs, ddof=1) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]"


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for mode in dict.fromkeys(row["mode"] for row in rows):
        console.print(table([row for row in rows if row["mode"] == mode], mode))
    if rows:
        console.print(summary(rows))


def main() -> int:
    command = parser()
    args = command.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.show is not None:
        try:
            show(result_file.read(args.show)["rows"], console)
        except (OSError, ValueError, KeyError) as error:
            command.error(f"--show {args.show}: {error}")
        return 0
    ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    if args.device == "cuda" and torch.cuda.device_count() < max(2, ranks):
        command.error(f"needs {max(2, ranks)} GPUs, and there are {torch.cuda.device_count()}; --device cpu runs on the tests' stand-in")
    if ranks < 2:
        command.error("a collective needs two ranks")
    args.ops, args.sizes = list(dict.fromkeys(args.ops)), list(dict.fromkeys(args.sizes))
    unwritable = why_unwritable(args.out and str(args.out))
    if unwritable:
        command.error(f"--out: {unwritable}")
    try:
        find_library(os.environ.get("FLAGCX_PATH"), os.environ)
    except FlagCXError as error:
        command.error(str(error))
    measured, is_whole, code = Measured(), False, 0
    try:
        with interrupt_on_termination():
            collect(args, ranks, console, measured)
        is_whole = True
    except KeyboardInterrupt:
        console.print("interrupted; this is what there is")
        code = 130
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        print(f"collectives.py: {str(error).strip()}", file=sys.stderr)
        code = 1
    finally:
        show(measured.rows, console)
        if args.out is not None and measured.rows:
            kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT_VARIABLES) and name not in _LEFT_OUT}
            nccl = ".".join(map(str, torch.cuda.nccl.version())) if args.device == "cuda" else None
            head = result_file.header(ranks=ranks, flagcx=measured.version, nccl=nccl, variables=kept)
            result_file.write(args.out, head if is_whole else head | {"interrupted": True}, measured.rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
