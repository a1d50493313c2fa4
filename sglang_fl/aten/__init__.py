# SPDX-License-Identifier: Apache-2.0
"""Layer 1: PyTorch's own operators (ATen), replaced by FlagGems's kernels in this process.

``layer.py``      what the settings ask for, switched on and off
``operators.py``  a set of operators, registered with PyTorch's dispatcher
``scope.py``      in force everywhere, or in graphs only
``recorder.py``   the log of replaced operators
"""

from .layer import replace_operators, restore_operators, why_off
from .operators import AtenOperators, AtenReport
from .recorder import Recorder

__all__ = ["AtenOperators", "AtenReport", "Recorder", "replace_operators", "restore_operators", "why_off"]
