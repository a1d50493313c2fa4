# SPDX-License-Identifier: Apache-2.0
"""Two ranks on a plain CPU with ``--tp 2``, and the settings file and the dispatch log of docs/settings.md."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sglang_fl.cli.demo_model import RECITAL

from .conftest import Prompt, Running, off_by, serving

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).parents[2] / "docs/settings.md").read_text(encoding="utf-8")
SETTINGS, *_ = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LOG, *_ = re.findall(r"^```\n(# [^\n]*, process .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def running(model: Path, native_logprobs: list[list[float]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("tp2")
    (directory / "settings.yaml").write_text(SETTINGS)
    environ = {"SGLANG_FL_CONFIG": str(directory / "settings.yaml")}
    with serving(model, directory, "--tp", "2", "--enable-metrics", environ=environ) as found:
        yield found


def test_the_recital_is_exact(running: Running) -> None:
    assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
    # Both ranks write it, each its own lines.
    assert lines_of(running.dispatch_log.read_text(encoding="utf-8")) == lines_of(LOG), "docs/settings.md shows something else"
    assert running.server.log.read_text().count("layers bound") == 1, "one rank speaks for all"
    assert len(running.info()) == 1, "the ranks run the same, and show as one"


def lines_of(log: str) -> set[str]:
    """A dispatch log's lines, without its date and process."""
    return {re.sub(r"^# \S+, process \d+:", "# DATE, process N:", line) for line in log.splitlines()}


def test_logprobs_agree_with_one_rank(running: Running, prompts: list[Prompt], native_logprobs: list[list[float]]) -> None:
    for prompt, native in zip(prompts, native_logprobs, strict=True):
        assert off_by(running.logprobs(prompt), native, prompt.bounds) <= 1


def test_killing_a_rank_ends_the_server(running: Running) -> None:
    """The last test of this module: it leaves no server."""
    children = psutil.Process(running.server.pid).children(recursive=True)
    ranks = [child for child in children if "scheduler" in " ".join(child.cmdline())]
    assert len(ranks) == 2, [child.cmdline() for child in children]
    ranks[1].kill()
    assert running.server.process is not None
    started = time.monotonic()
    assert running.server.process.wait(timeout=60) != 0
    print(f"ended after {time.monotonic() - started:.1f} s")
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
