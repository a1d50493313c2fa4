# SPDX-License-Identifier: Apache-2.0
"""What a server runs, as plain data with a short hash: for its log, its metrics, and comparisons.

``facts.py``     versions, settings and the hash
``announce.py``  a server's log line and its metric
``compare.py``   reads the output of two servers or of ``sglang-fl ops --json``, and lists the differences
"""

from .compare import compare, read
from .facts import fingerprint, machine_facts, setting_facts, versions

__all__ = ["compare", "fingerprint", "machine_facts", "read", "setting_facts", "versions"]
