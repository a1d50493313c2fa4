# SPDX-License-Identifier: Apache-2.0
"""The kinds of check and what can come of a case; needs no PyTorch."""

#: The kinds of check.
SERVING, UNUSUAL, SPECIAL = "serving shapes", "unusual shapes", "nan, inf, denormals"
INPUTS, REPEATS, THREADS, GRAPH, COMPILE = "inputs and results", "repeats", "threads", "graph capture", "torch.compile"
#: For implementations that are declared batch-invariant.
BATCH = "batch invariance"

#: A line of the worker's: what is exact is being computed, or no longer.
IN_FLOAT64 = "in float64"

#: What the worker can say of a case,
OK, FAILED, REFUSED, SKIPPED = "ok", "failed", "refused", "skipped"
#: and what is said of one that it did not survive, or that was left out after several of those.
CRASHED, HUNG, NOT_RUN = "crashed", "hung", "not run"
FAILURES = frozenset({FAILED, CRASHED, HUNG, NOT_RUN})
