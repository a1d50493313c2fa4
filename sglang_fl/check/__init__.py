# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation computes what its operator's text says: ``sglang-fl check``.

``cases``              the inputs of each operator
``exact``              the results in float64, and how far off one may be
``implementation.py``  calls an implementation and compares its results
``accuracy.py``, ``contract.py``, ``graphs.py``  the kinds of check; ``check_case.py`` runs one of them
``worker.py``          the process that runs them, watched by ``runner.py``
``report.py``          the results as tables, as JSON and as a page
"""
