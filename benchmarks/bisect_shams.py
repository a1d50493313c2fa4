#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Does `sglang-fl bisect MODEL` accuse what is right? A model is loaded once; its kernels round otherwise in each search.

The kernels are those of tests/planted_faults.py, for a CPU. Each result of theirs is off by up to half a unit in the last place.

    python benchmarks/bisect_shams.py MODEL                       # prints what was said of each
    python benchmarks/bisect_shams.py MODEL --out benchmarks/results/bisect-shams.json   # adds the searches that are not in it yet
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import arguments
import result_file
from rich.console import Console
from rich.progress import track

from sglang_fl.bisect.model import ARGUMENTS, NO_DIFFERENCE, Job, bisect_loaded
from sglang_fl.config import Settings
from sglang_fl.model_run import LoadedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted_faults


def search(model: LoadedModel, job: Job, seed: int) -> dict[str, Any]:
    model.call(planted_faults.plant, f"rounds otherwise {seed}")
    report = bisect_loaded(model, job, lambda line: None)
    assert report.whole is not None and report.noise is not None
    return {
        "seed": seed,
        "source": result_file.source_hash(),
        "verdict": report.verdict,
        "culprits": [str(one) for one in report.culprits],
        "out_of_bounds": sum(one.problem is not None for one in report.findings),
        "effect": report.whole.worst,
        "noise": report.noise.worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a directory")
    parser.add_argument("--searches", type=arguments.positive, default=100, help="how many (default: 100)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--out", type=Path, help="write the figures to this file, after each search; what it has is not searched again")
    args = parser.parse_args()
    found = earlier(args.out, args.dtype) if args.out and args.out.exists() else []
    left = [seed for seed in range(args.searches) if seed not in {one["seed"] for one in found}]
    job = Job(args.model, Settings())
    with LoadedModel(args.model, [*ARGUMENTS, "--dtype", args.dtype], planted_faults.ENVIRON) as model:
        for seed in track(left, console=Console(stderr=True), transient=True):
            found.append(search(model, job, seed))
            if args.out:
                result_file.write(args.out, result_file.header(dtype=args.dtype), found)
    print(f"{len(found)} searches: {dict(Counter(one['verdict'] for one in found))}")
    accused = sum(one["verdict"] != NO_DIFFERENCE for one in found)
    print(f"accused: {accused}; the largest effect over the noise: {max(one['effect'] / one['noise'] for one in found):.2f}")


def earlier(path: Path, dtype: str) -> list[dict[str, Any]]:
    """The searches of a result file, each with the source that made it."""
    data = result_file.read(path)
    if data["dtype"] != dtype:
        sys.exit(f"{path} has searches in {data['dtype']}, not in {dtype}")
    return [{"source": data["source"], **row} for row in data["rows"]]


if __name__ == "__main__":
    main()
