# SPDX-License-Identifier: Apache-2.0
"""First runs of FlagGems functions and of operators' implementations.

Callers handle a trial that raises. This package handles one that hangs or kills the process:

``guard.py``   writes a name to the record before its first run, and ends the process if the run exceeds its limit
``record.py``  the file that the next start reads, to leave out what ended an earlier start
``graph.py``   a run inside a graph that is discarded
"""

from .guard import TO_TRY_AGAIN, Guard, current_guard, open_guard, record_path
from .record import Death, TrialRecord, environment, forget, settled_record

__all__ = [
    "TO_TRY_AGAIN",
    "Death",
    "Guard",
    "TrialRecord",
    "current_guard",
    "environment",
    "forget",
    "open_guard",
    "record_path",
    "settled_record",
]
