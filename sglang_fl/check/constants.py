# SPDX-License-Identifier: Apache-2.0
"""The kinds of check and the statuses of a case. Does not need PyTorch."""

#: The kinds of check. Accuracy: calls of serving; models' sizes; allowed but rare calls; nan, inf, denormals.
SERVING, SIZES, UNUSUAL, SPECIAL = "serving", "sizes", "unusual", "extremes"
#: The contract: where results lie and how long they stay valid; equal results again, in threads, in a graph, compiled.
INPUTS, REPEATS, THREADS, GRAPH, COMPILE = "inputs", "repeats", "threads", "graph", "compile"
#: For implementations that are declared batch-invariant.
BATCH = "batch"

#: The time of serving's calls, measured with nothing else running.
SPEED = "speed"

#: The phases of a worker. Each has its own time limit.
STARTING, RUNNING, COMPILING, IN_FLOAT64 = "starting", "running", "compiling", "in float64"

#: Statuses from the worker.
OK, FAILED, REFUSED, SKIPPED = "ok", "failed", "refused", "skipped"
#: Statuses from the worker that are not reported. A case that ran out of memory next to others is run again alone.
#: A case that failed and lost the device has failed; the next one gets a new process.
NO_MEMORY, DEVICE_LOST = "out of memory", "device lost"
#: Statuses of a case that crashed, hung or compiled too long, and of one left out after several of these.
CRASHED, HUNG, TOO_LONG, NOT_RUN = "crashed", "hung", "compiled too long", "not run"
LOST = frozenset({CRASHED, HUNG, TOO_LONG})
FAILURES = LOST | {FAILED, NOT_RUN}


def case_name(op: str, check: str, name: str, dtype: str) -> str:
    """The full name of a case: ``rms_norm sizes tokens=65537 hidden=64 dtype=bfloat16``."""
    return f"{op} {check} {name} dtype={dtype}"


def case_matches(full_name: str, asked: str) -> bool:
    """Whether a case's name has all the given words."""
    return set(asked.split()) <= set(full_name.split())
