# SPDX-License-Identifier: Apache-2.0
"""A model loaded once in SGLang's own ModelRunner, without a server. Replacements are switched within the process.

``processes.py``  LoadedModel: one worker process per rank, and function calls in them; a crash or a hang raises an error here
``worker.py``     a worker process
``run.py``        ModelRun, the first argument of these functions: forced tokens and their log-probabilities
``graphs.py``     SGLang's graphs of the model, captured on request
``switches.py``   the replacements in the model: on, off, observed

    with LoadedModel("Qwen/Qwen3-8B", ["--tp", "2"]) as model:
        of_each_rank = model.call(function, *arguments)   # function(run, *arguments) in each rank
"""

from .processes import CallFailed, Crashed, Hung, LoadedModel, RunFailed
from .run import Batch, ModelRun
from .switches import Replacement

__all__ = ["Batch", "CallFailed", "Crashed", "Hung", "LoadedModel", "ModelRun", "Replacement", "RunFailed"]
