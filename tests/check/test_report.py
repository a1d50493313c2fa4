# SPDX-License-Identifier: Apache-2.0
"""Rows, verdict and pages of made-up cases."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from sglang_fl.check.constants import CRASHED, FAILED, HUNG, NOT_RUN, OK, REFUSED, SERVING, SKIPPED, SPEED, UNUSUAL
from sglang_fl.check.page import as_html
from sglang_fl.check.report import print_report
from sglang_fl.check.results import CaseResult, Report, Target, grouped

EVIL = "<script>alert('x')</script> [bold]&amp; [/nothing]"


def case(status: str = OK, check: str = SERVING, impl: str = "vendor.chip", **more: Any) -> CaseResult:
    given = {"op": "rms_norm", "impl": impl, "check": check, "name": "1 × 8", "dtype": "bfloat16", "status": status}
    return CaseResult(**{**given, **more})


def report(*cases: CaseResult, missing: list[Target] | None = None, not_reached: int = 0) -> Report:
    targets = [Target(op, impl, len(of)) for (op, impl), of in grouped(cases, lambda case: (case.op, case.impl)).items()]
    if not_reached:
        targets[0] = replace(targets[0], cases=targets[0].cases + not_reached)
    return Report(
        {"device": "a chip (cpu)"}, {"torch": "1"}, "2026-01-02T03:04:05", 5, False, [], targets + (missing or []), list(cases), 1.5
    )


def test_a_row_shows_the_case_nearest_to_its_bound() -> None:
    (row,) = report(
        case(error_ulp=3.0, bound_ulp=10.0, reference_ulp=2.5),
        case(error_ulp=0.4, bound_ulp=0.5, reference_ulp=0.1, compiling_s=2.0),
        case(check=SPEED, time_us=2.0, reference_us=4.0, compiling_s=1.5),
    ).rows()
    assert (row.cases, row.worst and row.worst.error_ulp, row.time_ratio, row.compiling_s) == (3, 0.4, 0.5, 3.5)
    assert row.result == OK


@pytest.mark.parametrize(
    ("statuses", "result", "passed"),
    [
        ([OK, OK], "ok", True),
        ([OK, REFUSED], "ok, 1 refused", True),
        ([OK, FAILED, CRASHED], "failed: 2 of 3", False),
        ([REFUSED, CRASHED], "crashed: 1 of 2", False),
    ],
)
def test_what_a_row_says(statuses: list[str], result: str, passed: bool) -> None:
    made = report(*(case(status, UNUSUAL) for status in statuses))
    assert made.rows()[0].result == result
    assert (made.problems() == []) == passed == made.as_data()["ok"]


def test_nothing_that_was_checked_is_no_certificate() -> None:
    assert report().problems() == ["nothing was checked: no implementation is available"]
    assert report(case(REFUSED), case(SKIPPED)).problems() == ["rms_norm vendor.chip: it refused every case, so nothing was checked"]
    assert report(case(REFUSED), case(OK, impl="vendor.other")).problems() != []


def test_a_dtype_that_is_declared_and_always_refused() -> None:
    found = report(case(OK), case(REFUSED, dtype="float16"), case(REFUSED, UNUSUAL, dtype="float16")).problems()
    assert len(found) == 1 and "refused every case in float16; if it does not take that dtype, say so" in found[0]


def test_what_was_asked_for_by_name_and_cannot_run() -> None:
    missing = Target("rms_norm", "vendor.x", 0, "no such chip")
    assert report(case(OK), missing=[missing]).problems() == []
    (problem,) = report(case(OK), missing=[replace(missing, named=True)]).problems()
    assert problem == "rms_norm vendor.x: requested by name, but not checked: no such chip"


def test_what_is_said_of_cases_that_were_left_out() -> None:
    made = report(case(HUNG), case(NOT_RUN), case(NOT_RUN), case(NOT_RUN, UNUSUAL))
    assert made.problems() == [
        "rms_norm vendor.chip: serving in bfloat16: hung: 1 of 3 (2 not run)",
        "rms_norm vendor.chip: unusual in bfloat16: not run: 1 of 1",
    ]


def test_a_run_that_was_not_finished() -> None:
    """Nothing failed yet, and nothing is certified; what failed has failed, and what was refused so far may still be taken."""
    made = report(case(OK), case(REFUSED, dtype="float16"), not_reached=3)
    assert (made.verdict, made.problems(), made.as_data()["not_reached"], made.as_data()["ok"]) == ("INCOMPLETE", [], 3, False)
    assert "INCOMPLETE: 2 cases" in printed(made) and "3 cases were not run" in printed(made)
    assert "<strong>INCOMPLETE:</strong> 3 cases were not run." in as_html(made)
    assert report(case(FAILED), not_reached=1).verdict == "FAILED"


def printed(made: Report) -> str:
    out = io.StringIO()
    print_report(made, Console(file=out, width=200, markup=False, emoji=False))
    return out.getvalue()


def test_printed() -> None:
    missing = [Target("rms_norm", "vendor.far", 0, f"it is elsewhere {EVIL}")]
    text = printed(report(case(FAILED, message=EVIL), case(FAILED, name="second"), case(REFUSED, UNUSUAL, message="no"), missing=missing))
    assert f"rms_norm vendor.chip, serving, bfloat16: 1 × 8: {EVIL} (and 1 more)" in text
    assert "FAILED: 3 cases in 2 s, 2 failed, 1 refused, seed 5." in text
    assert "again: sglang-fl check --impl vendor.chip --seed 5 --case 'rms_norm serving 1 × 8 dtype=bfloat16'" in text
    assert "vendor.far" in text and "it is elsewhere" in text
    assert "PASSED: 1 cases" in printed(report(case()))


def test_page() -> None:
    """Well-formed, nothing of it from elsewhere, and nothing that an implementation says is markup."""
    made = report(
        case(FAILED, message=EVIL, output=EVIL, name=EVIL, error_ulp=2.0, bound_ulp=1.0),
        case(impl=EVIL),
        missing=[Target(EVIL, EVIL, 0, EVIL)],
    )
    page = as_html(made)
    assert "<script" not in page and "http" not in page
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            if tag not in ("meta", "!doctype"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attributes: Any) -> None: ...

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(page)
    assert open_tags == []
    assert page.count("alert(&#39;x&#39;)") >= 5


def test_data() -> None:
    data = json.loads(json.dumps(report(case(FAILED, message="wrong"), case(error_ulp=0.25, bound_ulp=0.5)).as_data()))
    assert data["ok"] is False and data["seed"] == 5
    assert [one["status"] for one in data["cases"]] == [FAILED, OK]
    assert data["rows"][0]["failed"] == 1 and data["rows"][0]["worst"] == "rms_norm serving 1 × 8 dtype=bfloat16"
