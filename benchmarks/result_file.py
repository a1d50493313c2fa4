# SPDX-License-Identifier: Apache-2.0
"""Result files: JSON with what was run, where and when, and one line for each row."""

import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from machine import versions

from sglang_fl.utils.files import rounded, write_whole

_EXACT = ("args", "kwargs")


def header(**more: Any) -> dict[str, Any]:
    """What was run, where and when; ``more`` is what else the reader of the rows must know."""
    import torch

    found = {"python": platform.python_version(), **versions()}
    machine: dict[str, Any] = {"gpu": None, "cpu": platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "machine": machine,
        "versions": found,
        "source": source_hash(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
        **more,
    }


def command() -> str:
    """What was run, without where things lie outside of the working directory: that says nothing to others."""
    arguments = [re.sub(r"^(--[\w-]+=)?/.*/(?=.)", r"\1", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def source_hash() -> str:
    """What was measured, and by what: changes with any line of sglang_fl, its profiles included, or of the benchmarks."""
    import sglang_fl

    found = hashlib.sha256()
    for root, kinds in ((Path(sglang_fl.__file__).parent, ("*.py", "*.yaml")), (Path(__file__).parent, ("*.py",))):
        for path in sorted(path for kind in kinds for path in root.rglob(kind)):
            found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def write(path: Path, head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a result file, or replace it whole; keys of a row whose value is None are left out.

    Figures are rounded; the arguments of a recorded call are no figures.
    """
    lines = [
        json.dumps({key: value if key in _EXACT else rounded(value) for key, value in row.items() if value is not None}) for row in rows
    ]
    place = '"rows": []'
    table = '"rows": [\n' + ",\n".join(f"  {line}" for line in lines) + "\n ]" if lines else place
    text = json.dumps(rounded(head) | {"rows": []}, indent=1).replace(place, table) + "\n"
    write_whole(path, text)


def parse(text: str, where: str) -> Any:
    """JSON, which has no NaN and no infinities. Raises ValueError, naming the place, for what is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no figure")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError if it is none."""
    found = parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError(f"{path} is no result file: it has no rows")
    return found
