# SPDX-License-Identifier: Apache-2.0
"""The kinds of check and the statuses of a case; needs no PyTorch."""

#: The kinds of check.
SERVING, UNUSUAL, SPECIAL = "serving shapes", "unusual shapes", "nan, inf, denormals"
INPUTS, REPEATS, THREADS, GRAPH, COMPILE = "inputs and results", "repeats", "threads", "graph capture", "torch.compile"
#: For implementations that are declared batch-invariant.
BATCH = "batch invariance"

#: A message of the worker's: it computes in float64, or no longer.
IN_FLOAT64 = "in float64"

#: What the worker reports of a case.
OK, FAILED, REFUSED, SKIPPED = "ok", "failed", "refused", "skipped"
#: Of a case that ended or hung its process, and of one that was left out after several of those.
CRASHED, HUNG, NOT_RUN = "crashed", "hung", "not run"
FAILURES = frozenset({FAILED, CRASHED, HUNG, NOT_RUN})
