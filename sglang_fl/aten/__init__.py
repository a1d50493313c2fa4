# SPDX-License-Identifier: Apache-2.0
"""Layer 1: PyTorch's own operators (ATen), replaced by FlagGems's kernels in this process.

``layer.py``      what the settings ask for, switched on and off
``operators.py``  a set of operators, registered with PyTorch's dispatcher
``scope.py``      in force everywhere, or in graphs only; where SGLang's captures and the model's first passes are met
``trials.py``     first calls: what fails goes to PyTorch
``capture.py``    one graph, captured again without what failed
``captured.py``   which graphs that were, for the log
``agreement.py``  what failed on one rank is left out on all
``recorder.py``   the log of replaced operators
"""

from .layer import in_force, replace_operators, restore_operators, why_off
from .operators import AtenOperators, AtenReport
from .recorder import Recorder
from .trials import Trials

__all__ = ["AtenOperators", "AtenReport", "Recorder", "Trials", "in_force", "replace_operators", "restore_operators", "why_off"]
