# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl check``: tests whether an implementation computes what its operator's docstring says.

``cases``              the inputs of each operator
``exact``              the results in float64, and the bounds of the error
``implementation.py``  calls an implementation and compares its results
``accuracy.py``, ``contract.py``, ``graphs.py``  the kinds of check; ``check_case.py`` runs one of them
``worker.py``          the process that runs them, started by ``runner.py`` through ``process.py``
``record.py``          saves the ``results.py`` in a file; ``report.py`` and ``page.py`` show them, ``certificates.py`` finds them
``archive.py``         the inputs of a failing case, with a script that repeats it
"""
