# SPDX-License-Identifier: Apache-2.0
"""SGLang's graphs of a model. They are captured on request, any number of times, not when the model is loaded."""

import gc
from collections.abc import Callable, Collection, Mapping
from typing import Any

PREFILL, DECODE = "prefill", "decode"


def captured_of(runner: Any) -> dict[str, Any]:
    """The phases that SGLang has graphs of, each with what replays them. It drops prefill graphs for some models, GPT-2's for one.

    Args:
        runner: SGLang's ModelRunner.
    """
    found = {PREFILL: runner.prefill_cuda_graph_runner, DECODE: runner.decode_cuda_graph_runner}
    return {name: graphs for name, graphs in found.items() if graphs is not None and graphs is not runner.eager_runner}


class Graphs:
    """The graphs that the server's arguments ask for. Create it after SGLang has published them, and before it loads the model.

    Attributes:
        replayed: the phases, PREFILL and DECODE, whose graphs were replayed since the capture. SGLang may run a batch without them.
    """

    def __init__(self) -> None:
        self.replayed: set[str] = set()
        from sglang.srt.runtime_context import get_exec

        config = get_exec().graph.cuda_graph_config
        self._phases: dict[str, Any] = {PREFILL: config.prefill, DECODE: config.decode}
        self._backends = {name: phase.backend for name, phase in self._phases.items()}
        self._sizes = {name: tuple(phase.bs or ()) for name, phase in self._phases.items()}
        self._disable()

    def _disable(self) -> None:
        from sglang.srt.model_executor.cuda_graph_config import Backend

        for phase in self._phases.values():
            phase.backend = Backend.DISABLED

    def capture(self, runner: Any, needed: Mapping[str, Collection[int]]) -> bool:
        """Drop the graphs and capture them with the replacements that are on now.

        Args:
            runner: SGLang's ModelRunner.
            needed: PREFILL -> the numbers of tokens, DECODE -> the numbers of sequences. Only the graph sizes that these are padded
                to are captured.

        Returns:
            whether there are graphs.
        """
        from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
        from sglang.srt.platforms import current_platform

        self.drop(runner)
        for name, phase in self._phases.items():
            fitting = {min((size for size in self._sizes[name] if size >= count), default=0) for count in needed[name]}
            phase.bs = sorted(fitting - {0})
            if phase.bs:
                phase.backend = self._backends[name]
        # In SGLang's order: prefill first.
        runner.graph_shared_output = GraphSharedOutput.create_for_model_runner(runner)
        runner.init_prefill_cuda_graph()
        if current_platform.capabilities.graph_capture:
            runner.init_decode_cuda_graph()
        captured = captured_of(runner)
        for name, graphs in captured.items():
            graphs.execute = self._noted(name, graphs.execute)
        return bool(captured)

    def _noted(self, phase: str, execute: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.replayed.add(phase)
            return execute(*args, **kwargs)

        return noted

    def drop(self, runner: Any) -> None:
        """Run without graphs again.

        The next ones get a memory pool of their own. PyTorch refuses a pool whose graphs are gone while any of its memory is in use,
        and they go when Python collects them.
        """
        from sglang.srt.model_executor.runner import set_global_graph_memory_pool
        from sglang.srt.platforms import current_platform

        self._disable()
        self.replayed.clear()
        runner.prefill_cuda_graph_runner, runner.decode_cuda_graph_runner = runner.eager_runner, None
        set_global_graph_memory_pool(None)
        gc.collect()
        current_platform.empty_cache()
