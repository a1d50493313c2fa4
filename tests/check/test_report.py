# SPDX-License-Identifier: Apache-2.0
"""Rows, verdict and pages of made-up cases."""

import io
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from sglang_fl.check.constants import CRASHED, FAILED, HUNG, NOT_RUN, OK, REFUSED, SERVING, SKIPPED, UNUSUAL
from sglang_fl.check.report import CaseResult, Report, as_html, print_report

EVIL = "<script>alert('x')</script> [bold]&amp; [/nothing]"


def case(status: str = OK, check: str = SERVING, impl: str = "vendor.chip", **more: Any) -> CaseResult:
    return CaseResult("rms_norm", impl, check, more.pop("name", "1 × 8"), more.pop("dtype", "bfloat16"), status, **more)


def report(*cases: CaseResult, not_available: list[dict[str, Any]] | None = None) -> Report:
    return Report({"device": "a chip (cpu)"}, {"torch": "1"}, 5, False, 1.5, not_available or [], list(cases))


def test_a_row_shows_the_case_nearest_to_its_bound() -> None:
    (row,) = report(
        case(error_ulp=3.0, bound_ulp=10.0, reference_ulp=2.5, time_ratio=1.0),
        case(error_ulp=0.4, bound_ulp=0.5, reference_ulp=0.1, time_ratio=4.0),
        case(time_ratio=2.0),
    ).rows()
    assert (row.cases, row.error_ulp, row.bound_ulp, row.reference_ulp, row.time_ratio) == (3, 0.4, 0.5, 0.1, 2.0)
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
    made = report(*(case(status, UNUSUAL) for status in statuses), case())
    assert made.rows()[0].result == result
    assert (made.problems() == []) == passed == made.as_data()["ok"]


def test_nothing_that_was_checked_is_no_certificate() -> None:
    assert report().problems() == ["nothing was checked: no implementation is available"]
    assert report(case(REFUSED), case(SKIPPED)).problems() == ["rms_norm vendor.chip: it refused every case, so nothing of it was checked"]
    assert report(case(REFUSED), case(OK, impl="vendor.other")).problems() != []


def test_a_dtype_that_is_declared_and_always_refused() -> None:
    found = report(case(OK), case(REFUSED, dtype="float16"), case(REFUSED, UNUSUAL, dtype="float16")).problems()
    assert len(found) == 1 and "refused every case in float16; if it does not take that dtype, say so" in found[0]


def test_what_was_asked_for_by_name_and_cannot_run() -> None:
    missing = {"op": "rms_norm", "impl": "vendor.x", "why": "no such chip"}
    assert report(case(OK), not_available=[missing]).problems() == []
    (problem,) = report(case(OK), not_available=[{**missing, "named": True}]).problems()
    assert problem == "rms_norm vendor.x: it was asked for, and not checked: no such chip"


def test_what_is_said_of_cases_that_were_left_out() -> None:
    made = report(case(HUNG), case(NOT_RUN), case(NOT_RUN), case(NOT_RUN, UNUSUAL))
    assert [row.result for row in made.rows()] == ["hung: 1 of 3 (2 not run)", "not run: 1 of 1"]


def printed(made: Report) -> str:
    out = io.StringIO()
    print_report(made, Console(file=out, width=200, markup=False, emoji=False))
    return out.getvalue()


def test_printed() -> None:
    missing = [{"op": "rms_norm", "impl": "vendor.far", "why": f"it is elsewhere {EVIL}"}]
    text = printed(
        report(case(FAILED, message=EVIL), case(FAILED, name="second"), case(REFUSED, UNUSUAL, message="no"), not_available=missing)
    )
    assert f"rms_norm vendor.chip, serving, bfloat16: 1 × 8: {EVIL} (and 1 more)" in text
    assert "FAILED: 3 cases in 2 s, 1 refused, seed 5." in text
    assert "vendor.far" in text and "it is elsewhere" in text
    assert "PASSED: 1 cases" in printed(report(case()))


def test_page() -> None:
    """Well-formed, nothing of it from elsewhere, and nothing that an implementation says is markup."""
    made = report(
        case(FAILED, message=EVIL, output=EVIL, name=EVIL), case(impl=EVIL), not_available=[{"op": EVIL, "impl": EVIL, "why": EVIL}]
    )
    page = as_html(made)
    assert "<script" not in page and "http" not in page
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            if tag not in ("meta", "!doctype"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(page)
    assert open_tags == []
    assert page.count("alert(&#x27;x&#x27;)") >= 5


def test_data() -> None:
    data = json.loads(json.dumps(report(case(FAILED, message="wrong"), case(error_ulp=0.25, bound_ulp=0.5)).as_data()))
    assert data["ok"] is False and data["seed"] == 5
    assert [one["status"] for one in data["cases"]] == [FAILED, OK]
    assert data["rows"][0]["failed"] == 1 and data["rows"][0]["error_ulp"] == 0.25
