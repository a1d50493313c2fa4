# SPDX-License-Identifier: Apache-2.0
"""The first run of what sglang-fl brings into a server: a function of FlagGems, or an implementation of an operator.

What raises in its trial gives way to the next in order; its callers see to that. What hangs or kills the process is the matter here:

``guard.py``   writes a name down before its first run, and ends the process where that run does not end
``record.py``  the file that the next start reads, to leave out what ended an earlier one
``graph.py``   a run inside a graph that is thrown away
"""

from .guard import Guard, current_guard, open_guard, record_path
from .record import Death, TrialRecord, environment, forget, settled_record

__all__ = ["Death", "Guard", "TrialRecord", "current_guard", "environment", "forget", "open_guard", "record_path", "settled_record"]
