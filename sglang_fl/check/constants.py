# SPDX-License-Identifier: Apache-2.0
"""The kinds of check and the statuses of a case; needs no PyTorch."""

#: The kinds of check. About accuracy: what serving calls; models' sizes; what is allowed and rare; nan, inf, denormals.
SERVING, SIZES, UNUSUAL, SPECIAL = "serving", "sizes", "unusual", "extremes"
#: About the rest: where results lie and how long they stay, and that they come out alike again, in threads, in a graph, compiled.
INPUTS, REPEATS, THREADS, GRAPH, COMPILE = "inputs", "repeats", "threads", "graph", "compile"
#: For implementations that are declared batch-invariant.
BATCH = "batch"

#: The time of serving's calls, taken alone on the machine.
SPEED = "speed"

#: What a worker is at: each has a time limit of its own.
STARTING, RUNNING, COMPILING, IN_FLOAT64 = "starting", "running", "compiling", "in float64"

#: What the worker reports of a case; of one that found no memory beside others, which is run again alone.
OK, FAILED, REFUSED, SKIPPED, NO_MEMORY = "ok", "failed", "refused", "skipped", "out of memory"
#: Of a case that ended or hung its process or was compiled for too long, and of one that was left out after several of those.
CRASHED, HUNG, TOO_LONG, NOT_RUN = "crashed", "hung", "compiled too long", "not run"
LOST = frozenset({CRASHED, HUNG, TOO_LONG})
FAILURES = LOST | {FAILED, NOT_RUN}


def case_name(op: str, check: str, name: str, dtype: str) -> str:
    """What a case is found again by: ``rms_norm sizes tokens=65537 hidden=64 dtype=bfloat16``."""
    return f"{op} {check} {name} dtype={dtype}"


def case_matches(full_name: str, asked: str) -> bool:
    """Whether a case has all the words that were asked for."""
    return set(asked.split()) <= set(full_name.split())
