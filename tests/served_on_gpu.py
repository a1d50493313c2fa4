# SPDX-License-Identifier: Apache-2.0
"""Real servers on one GPU with SGLang's default graphs, side by side, and what each of them must do."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from e2e.conftest import Prompt, Running, off_by, serving

from sglang_fl.cli.demo_model import RECITAL

#: Of one of several on the same GPU.
SHARE = ("--max-total-tokens", "16384", "--mem-fraction-static", "0.9")
#: Of one on two GPUs: other tests hold memory on one of them, which SGLang takes for a mistake; and NVLink multicast stays off, as
#: some machines need it.
TWO_GPUS = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0", "NCCL_NVLS_ENABLE": "0"}
#: FlagOS for everything that is right here, but for matrix products: FlagGems tunes mm for each size of a prefill graph, which
#: lets a first start take five minutes more. mul is what the profile keeps from FlagGems.
FLAGOS = {"SGLANG_FL_PREFER": "flagos", "SGLANG_FL_FLAGOS_BLACKLIST": "mm,mul"}


@dataclass(frozen=True)
class Way:
    """A way to run a server, and where its layers must then have run."""

    destination: str
    environ: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()


@contextmanager
def side_by_side(
    model: Path, ways: Mapping[str, Way], dtype: str, directories: pytest.TempPathFactory, share: Sequence[str] = SHARE
) -> Iterator[dict[str, Future[Running]]]:
    """A server for each way, by its name. They start together, since a start takes minutes where kernels are compiled."""
    # Made here: pytest makes directories in one thread only.
    places = {name: directories.mktemp(name.replace(" ", "-")) for name in ways}
    with ExitStack() as stack, ThreadPoolExecutor(len(ways)) as pool:

        def start(name: str) -> Running:
            way = ways[name]
            return stack.enter_context(serving(model, places[name], *share, *way.arguments, dtype=dtype, environ=way.environ))

        yield {name: pool.submit(start, name) for name in ways}


def recited(running: Running) -> str:
    return str(running.recite().json()["choices"][0]["message"]["content"])


def check_the_recital(running: Running) -> None:
    """Word for word: alone, and of sixteen at once, which are padded to a graph's size."""
    assert recited(running) == RECITAL
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda _: recited(running), range(16))) == [RECITAL] * 16


def check_logprobs(running: Running, name: str, prompts: Sequence[Prompt]) -> None:
    """Within half of what the bounds allow two runs to differ by: what is exact is on neither side."""
    worst = max(off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) for prompt in prompts)
    print(f"{name}: logprobs are off by {worst:.3f} of what rounding may cost two runs")
    assert worst <= 0.5
