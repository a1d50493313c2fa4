# SPDX-License-Identifier: Apache-2.0
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "gpu" / "conftest.py"


def report(when: str, outcome: str, printed: str = "") -> pytest.TestReport:
    sections = [("Captured stdout call", printed)] if printed else []
    return pytest.TestReport("tests/gpu/test_a.py::test_b[c]", ("", 0, ""), {}, outcome, None, when, sections, duration=1.234)  # type: ignore[arg-type]


def test_what_ran_is_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from_file_location("gpu_conftest", CONFTEST)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "record.jsonl"
    module.pytest_runtest_logreport(report("call", "passed"))
    assert not file.exists()
    monkeypatch.setenv("TEST_GPU_RECORD", str(file))
    for when, outcome in (("setup", "passed"), ("setup", "skipped"), ("call", "passed"), ("call", "skipped"), ("setup", "failed")):
        module.pytest_runtest_logreport(report(when, outcome, "off by 0.02\n"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["outcome"], line["seconds"], line["printed"]) for line in lines] == [
        ("passed", 1.23, ["off by 0.02"]),
        ("failed", 1.23, ["off by 0.02"]),
    ]
    assert all(len(line["source"]) == 12 and isinstance(line["devices"], list) for line in lines)
