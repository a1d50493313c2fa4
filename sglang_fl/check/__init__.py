# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation computes what its operator's text says: ``sglang-fl check``.

``cases`` has the inputs, ``exact`` the results in float64 and how far off one may be, ``measure`` runs an
implementation on a case, ``worker`` is the process it runs in, ``runner`` the one that watches it, and
``report`` shows what came of it.
"""
