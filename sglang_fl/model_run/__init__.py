# SPDX-License-Identifier: Apache-2.0
"""A model loaded once in SGLang's own ModelRunner, outside of a server, with what sglang-fl replaces switched in the process.

``processes.py``  LoadedModel: one worker process a rank, and calls of functions in them; a crash or a hang is an error of ours
``worker.py``     such a process
``run.py``        ModelRun: what functions that are called there get; forced tokens and their log-probabilities
``switches.py``   what sglang-fl replaces in the model: on, off and observed

    with LoadedModel("Qwen/Qwen3-8B", ["--tp", "2"]) as model:
        of_each_rank = model.call(function, *arguments)   # function(run, *arguments) in each rank
"""

from .processes import CallFailed, Crashed, Hung, LoadedModel, RunFailed
from .run import Batch, ModelRun
from .switches import Replacement

__all__ = ["Batch", "CallFailed", "Crashed", "Hung", "LoadedModel", "ModelRun", "Replacement", "RunFailed"]
