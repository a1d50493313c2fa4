# SPDX-License-Identifier: Apache-2.0
"""First runs: of a FlagGems function, or of an operator's implementation.

What raises in its trial is handled by the callers. This package handles what hangs or kills the process:

``guard.py``   writes a name down before its first run, and ends the process where that run does not end
``record.py``  the file that the next start reads, to leave out what ended an earlier one
``graph.py``   a run inside a graph that is discarded
"""

from .guard import Guard, current_guard, open_guard, record_path
from .record import Death, TrialRecord, environment, forget, settled_record

__all__ = ["Death", "Guard", "TrialRecord", "current_guard", "environment", "forget", "open_guard", "record_path", "settled_record"]
