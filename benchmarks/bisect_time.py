#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long does `sglang-fl bisect MODEL` take to find one wrong gather of FlagGems's `index` (tests/planted_faults.py)?

    python benchmarks/bisect_time.py demo-model --out benchmarks/results/bisect-time-cpu.json -- --dtype float32
    python benchmarks/bisect_time.py qwen3-8b --out benchmarks/results/bisect-time-nvidia-h200.json -- --dtype bfloat16

On a CPU the functions and layers that are on stand in for FlagGems's. Elsewhere all of FlagOS is on, but `mm` and `mul`.
A built-in shape gets random weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import result_file
from shapes import UnknownShape, load_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted_faults
import torch

_FLAGOS = {
    **{name: planted_faults.ENVIRON[name] for name in ("SGLANG_FL_PLUGIN_MODULES", "PYTHONPATH")},
    "SGLANG_FL_PREFER": "flagos",
    "SGLANG_FL_FLAGOS_BLACKLIST": "mm,mul",
}
_KEPT = ("verdict", "message", "facts", "noise", "effect", "loads", "seconds", "steps")


def search(model: Path, server_arguments: list[str]) -> dict[str, Any]:
    environ = _FLAGOS if torch.accelerator.is_available() else planted_faults.ENVIRON
    command = [sys.executable, "-m", "sglang_fl", "bisect", str(model), "--json", "--", *server_arguments]
    done = subprocess.run(command, env={**os.environ, **environ, "PLANTED_FAULT": "one gather"}, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(done.returncode)
    report = json.loads(done.stdout)
    return {
        "culprits": [one["name"] for one in report["culprits"]],
        "trials": len(report["trials"]),
        "replacements": sorted({one["replacement"] for one in report["findings"]}),
        "calls": sum(one["calls"] for one in report["findings"]),
        **{name: report[name] for name in _KEPT},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a directory, or a built-in shape such as qwen3-8b; server arguments go after --")
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    args, others = parser.parse_known_args()
    given = [argument for argument in others if argument != "--"]
    try:
        shape = load_shape(args.model)
    except UnknownShape as error:
        parser.error(str(error))
    random = [] if shape.directory else ["--load-format", "dummy", "--skip-tokenizer-init"]
    with tempfile.TemporaryDirectory() as directory:
        row = {"model": shape.name, **search(shape.write(Path(directory) / "model"), [*random, *given])}
    print(f"{row['model']}: {row['verdict']} {row['culprits']}; {row['seconds']:.0f} s; loads: {row['loads']}; trials: {row['trials']}")
    if args.out:
        result_file.write(args.out, result_file.header(), [row])


if __name__ == "__main__":
    main()
