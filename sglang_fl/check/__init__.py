# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl check``: whether an implementation computes what its operator's docstring says.

``cases``              the inputs of each operator
``exact``              the results in float64, and how far off one may be
``implementation.py``  calls an implementation and compares its results
``accuracy.py``, ``contract.py``, ``graphs.py``  the kinds of check; ``check_case.py`` runs one of them
``worker.py``          the process that runs them: a ``process.py`` for ``runner.py``, which hands out the cases
``record.py``          the results in a file, of ``results.py``; ``report.py`` and ``page.py`` show them, ``certificates.py`` finds them
``archive.py``         the inputs of a failing case, with a script that repeats it
"""
