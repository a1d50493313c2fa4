#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many runs `sglang-fl bisect --run` needs, and how often it is right: the real search against simulated commands.

One of 430 switches is to blame, drawn anew for each seed; nothing is known of it before. A run's answer is wrong at the rates of the
scenario. The runs include those with all switches on and all off.

    python benchmarks/bisect_search.py                            # prints a table
    python benchmarks/bisect_search.py --out benchmarks/results/bisect-search.json
"""

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arguments
import result_file
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sglang_fl.bisect.search import NO_OPERATOR, NOTHING, Hypothesis, Search

SWITCHES = tuple(f"switch{number}" for number in range(430))
#: A search without a verdict ends here, as the command's does by default.
LIMIT = 40


@dataclass(frozen=True)
class Scenario:
    """What a command does.

    Attributes:
        false_failures, false_successes: how often a run fails that should not, and the other way round.
        cause: None: one switch, drawn for each seed; "pair": two, both needed; "coin": the answers are random.
        options: of the search.
    """

    name: str
    false_failures: float = 0.0
    false_successes: float = 0.0
    cause: Hypothesis | str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search came to. ``accused`` is true if it named a switch that is not to blame."""

    runs: int
    right: bool
    accused: bool


FIVE_PERCENT = Scenario("one switch, 5 % wrong answers", 0.05, 0.05)
SCENARIOS = (
    FIVE_PERCENT,
    Scenario("one switch, no wrong answers"),
    Scenario("one switch, 1 % wrong answers", 0.01, 0.01),
    Scenario("one switch, 10 % wrong answers", 0.10, 0.10),
    Scenario("one switch, 15 % wrong answers", 0.15, 0.15),
    Scenario("one switch, 10 % false failures", 0.10, 0.0),
    Scenario("one switch, 10 % false successes", 0.0, 0.10),
    Scenario("one switch, 5 % wrong answers, 20 others suspected", 0.05, 0.05, None, {"weights": dict.fromkeys(SWITCHES[:20], 9.0)}),
    Scenario("no operator, 5 % wrong answers", 0.05, 0.05, NO_OPERATOR),
    Scenario("nothing fails, 5 % wrong answers", 0.05, 0.05, NOTHING),
    Scenario("two switches needed, 5 % wrong answers, searched for one", 0.05, 0.05, "pair"),
    Scenario("answers of a coin", 0.5, 0.5, "coin"),
    Scenario("one switch, in process (never wrong)", options={"truthful": True}),
)


def search(scenario: Scenario, seed: int) -> Found:
    """One search, to its verdict or the limit."""
    chance = random.Random(f"{scenario.name} {seed}")
    suspected = scenario.options.get("weights", {})
    innocent = [name for name in SWITCHES if name not in suspected]
    options = {**scenario.options, "weights": {name: suspected.get(name, 1.0) for name in SWITCHES}}
    cause = scenario.cause
    if not isinstance(cause, Hypothesis):
        cause = Hypothesis(tuple(chance.sample(innocent, 2)), 2) if cause == "pair" else Hypothesis((chance.choice(innocent),))
    found = Search(**options, seed=seed)
    while (verdict := found.verdict()) is None and len(found.runs) < LIMIT:
        on = found.next()
        due = len(on & set(cause.switches)) >= cause.needed
        wrong = chance.random() < (scenario.false_successes if due else scenario.false_failures)
        found.record(on, due != wrong)
    named = verdict.cause if verdict is not None else None
    # No single switch is to blame there: what is right is to accuse none.
    right = named is None or not named.switches if scenario.cause in ("pair", "coin") else named == cause
    return Found(len(found.runs), right, named is not None and bool(named.switches) and not right)


def rows(scenarios: Sequence[Scenario], seeds: int) -> Iterator[dict[str, Any]]:
    for scenario in scenarios:
        found = [search(scenario, seed) for seed in track(range(seeds), scenario.name, console=Console(stderr=True), transient=True)]
        runs = [one.runs for one in found]
        yield {
            "scenario": scenario.name,
            "seeds": seeds,
            "median": statistics.median(runs),
            "p90": statistics.quantiles(runs, n=10)[-1] if seeds > 1 else runs[0],
            "most": max(runs),
            "right": sum(one.right for one in found) / seeds,
            "wrongly_accused": sum(one.accused for one in found) / seeds,
            "no_verdict_in_40": sum(one.runs >= LIMIT for one in found) / seeds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=arguments.positive, default=1000, help="searches for each scenario (default: 1000)")
    parser.add_argument("--only", metavar="WORDS", default="", help="the scenarios whose names have these words")
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    scenarios = [scenario for scenario in SCENARIOS if args.only in scenario.name]
    if not scenarios:
        parser.error(f"--only: no scenario has {args.only!r}; there are: {'; '.join(scenario.name for scenario in SCENARIOS)}")
    table = Table(
        "scenario", "median", "90 %", "most", "right", "wrongly accused", f"no verdict in {LIMIT}", title=f"{len(SWITCHES)} switches"
    )
    found = []
    for row in rows(scenarios, args.seeds):
        found.append(row)
        shares = (f"{100 * row[name]:.1f} %" for name in ("right", "wrongly_accused", "no_verdict_in_40"))
        table.add_row(row["scenario"], f"{row['median']:g}", f"{row['p90']:g}", str(row["most"]), *shares)
    Console().print(table)
    if args.out:
        result_file.write(args.out, result_file.header(switches=len(SWITCHES)), found)


if __name__ == "__main__":
    main()
