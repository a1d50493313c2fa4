# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

from sglang_fl.model_run.graphs import captured_of


def test_a_phase_has_graphs_only_if_sglang_captured_some() -> None:
    """In the place of prefill graphs that it dropped SGLang has the runner that runs without any; without decode graphs there is none."""
    eager, decode = object(), object()
    runner = SimpleNamespace(eager_runner=eager, prefill_cuda_graph_runner=eager, decode_cuda_graph_runner=decode)
    assert captured_of(runner) == {"decode": decode}
    runner.decode_cuda_graph_runner = None
    assert captured_of(runner) == {}
