# SPDX-License-Identifier: Apache-2.0
"""The examples, run as they stand. The client of a server runs in test_serving.py, whose server is up already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from sglang_fl.cli.demo_model import QUESTION, RECITAL
from sglang_fl.utils.server import Server, free_port

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRON = {**os.environ, "PYTHON": sys.executable}


@pytest.mark.slow
def test_offline_inference(model: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / "offline_inference.py"), str(model)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [line for line in done.stdout.splitlines() if " → " in line]
    assert [answer.partition(" → ")[0] for answer in answers] == ["Recite Sonnet 18.", "The capital of France is", "1, 2, 3,"]
    assert "sglang-fl: 17 layers bound" in done.stdout + done.stderr


def node(rank: int, first_node: str, model: Path, directory: Path, split: list[str]) -> Server:
    server = Server(model, port=free_port(), log=directory / f"node-{rank}.log", environ=ENVIRON)
    arguments = [*split, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(server.port)]
    server._command = ["bash", str(EXAMPLES / "several_nodes.sh"), str(rank), first_node, str(model), *arguments]
    return server


@pytest.mark.slow
@pytest.mark.parametrize(("split", "rank"), [(["--tp", "2"], "TP1"), (["--pp-size", "2"], "PP1")], ids=["each layer", "the layers"])
def test_two_nodes_split(model: Path, tmp_path: Path, split: list[str], rank: str) -> None:
    first_node = f"127.0.0.1:{free_port()}"
    with node(0, first_node, model, tmp_path, split) as first, node(1, first_node, model, tmp_path, split) as second:
        first.wait_until_ready()
        asked = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40}
        answer = requests.post(f"{first.url}/v1/chat/completions", json=asked, timeout=300).json()
        recited = answer["choices"][0]["message"]["content"]
        assert len(recited) > 40 and RECITAL.startswith(recited)
        assert rank in second.log.read_text() and rank not in first.log.read_text(), "a rank on each"


@pytest.mark.slow
def test_speculative_decoding_names_what_a_plain_cpu_lacks(model: Path) -> None:
    command = ["bash", str(EXAMPLES / "speculative_decoding.sh"), str(model), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRON)
    assert done.returncode != 0
    assert "--speculative-algorithm EAGLE3: SGLang has no draft-model attention for torch_native" in done.stderr
