# SPDX-License-Identifier: Apache-2.0
"""The steps of ``sglang-fl tune``: noise, recording, checking, timing alone, serving, fresh starts."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..check.constants import FAILED, OK, TOO_LONG
from ..config import SettingsError
from ..dispatch.ops import OPERATORS
from . import traffic
from .baseline import Baseline
from .bench import NATIVE, Bench, Choice
from .budget import KINDS, Budget, BudgetOver
from .checking import Checker, case_of, is_crash
from .confirm import confirm
from .engine import CommandFailed, EngineFailed
from .journal import Journal
from .judge import (
    CRASHED,
    FUNCTION,
    NOT_BEST,
    NOT_CALLED,
    NOT_MEASURED,
    OUTSIDE,
    UNAVAILABLE,
    UNDECIDED,
    USED,
    WRONG,
    Candidate,
    Timed,
    judge_alone,
    timed,
)
from .layer_calls import calls_to_try
from .outcome import Outcome
from .serve import NotInForce, Served, choice_of
from .served import labels_of
from .statistics import LOOKS, smallest_effect, speed
from .timing import ROUNDS

#: Parts of a limited budget: for native against native beyond the first look, and for candidates alone.
_NOISE_SHARE, _ALONE_SHARE = 0.1, 0.6

_SAY_SECONDS = 20.0  # a step that takes longer reports its progress
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to tune.

    Attributes:
        directory: for files that a resumed run needs.
        deadline: of ``time.monotonic``. None: no limit.
        traffic: the user's requests, or None.
        baseline: an earlier profile, and what of it is measured again.
    """

    directory: Path
    deadline: float | None = None
    traffic: Path | None = None
    baseline: Baseline = field(default_factory=Baseline)


class Tuning:
    """One run.

    Args:
        write: writes the profile of an outcome to a file.
        say: shows a line with the remaining time.
    """

    def __init__(self, job: Job, bench: Bench, journal: Journal, say: Say, write: Callable[[Path, Outcome], None]):
        self._job, self._bench, self._journal, self._say, self._write = job, bench, journal, say, write
        self.outcome = Outcome()
        self.budget = Budget(job.deadline, journal.seconds)
        #: recorded call -> its number in the engine that recorded last; and which start that was
        self._numbers: dict[str, int] = {}
        self._recorded_by = 0
        self._calls = job.directory / "calls"  # recorded, for the checking process
        self._said, self._step = time.monotonic(), ""  # _step: what has begun, until something of it is measured

    def run(self) -> Outcome:
        """All steps, as far as the time goes. What it does not suffice for stays with SGLang."""
        try:
            self.measure()
            self.confirm()
        except BudgetOver as over:
            self._stopped(over)
            if self.outcome.about:
                self._choose()
        return self.outcome

    def measure(self) -> None:
        """Run all steps but the fresh starts, in one engine if it does not crash. Raises BudgetOver."""
        self._about()
        self._measure_noise()
        self._record()
        self._try()
        self._serve()

    def _stopped(self, over: BudgetOver) -> None:
        """The time is used up, for now or for good: what is not decided is not used."""
        self.outcome.incomplete = self.outcome.incomplete or str(over)
        for candidate in self._open:
            candidate.settle(UNDECIDED, str(over))

    def _show(self, text: str) -> None:
        self._said, self._step = time.monotonic(), ""
        self._say(text)

    def _measured(self, kind: str, name: str, measure: Callable[[], Any]) -> Any:
        """From the journal, or made now. Raises BudgetOver if it would not end in time; shows how far the run is now and then."""
        if f"{kind}: {name}" not in self._journal:
            if self._step:
                self._show(self._step)
            elif time.monotonic() - self._said > _SAY_SECONDS:
                self._show(f"{KINDS[kind].words} done: {len(self._journal.seconds.get(kind, ()))}")
            self.budget.check(kind)
        found = self._journal.measured(kind, name, measure)
        self.budget.to_come[kind] = max(0, self.budget.to_come.get(kind, 0) - 1)
        return found

    def _about(self) -> None:
        self._step = "starting the engine"
        self.outcome.about = self._measured("about", "the engine", self._bench.about)
        self._bench.know(self.outcome.about)

    def _measure_noise(self) -> None:
        """Measure native against native, in pairs like those of a candidate."""
        self._step = "native against native"
        pairs = [self._noise(number) for number in range(LOOKS[0])]
        with self.budget.part(_NOISE_SHARE), suppress(BudgetOver):
            for number in range(LOOKS[0], LOOKS[-1]):
                if f"noise: {number}" not in self._journal and "record: calls" in self._journal:
                    break  # an earlier slice went on with what it had
                pairs.append(self._noise(number))
        self.budget.to_come["noise"] = 0
        for case in map(str, self._bench.cases):
            one, two = ([pair[side][case] for pair in pairs] for side in (0, 1))
            self.outcome.noise[case] = smallest_effect(speed(one, two))
            self.outcome.step_us[case] = 1e6 * sorted(one + two)[len(one)]
        shown = ", ".join(f"{100 * effect:.1f} % in {case}" for case, effect in self.outcome.noise.items())
        self._show(f"the smallest effect that this machine can show: {shown}")

    def _noise(self, number: int) -> list[dict[str, float]]:
        def pair() -> list[dict[str, float]]:
            self._bench.use(NATIVE)
            if number == 0:
                self._bench.round(0)  # caches fill
            return [self._bench.round(number), self._bench.round(number)]

        found: list[dict[str, float]] = self._measured("noise", str(number), pair)
        return found

    def _recording(self, directory: Path | None = None) -> dict[str, Any]:
        """Serve the traffic and the measured cases while recording. Calls of layers are saved in the directory."""
        bench, about = self._bench, self.outcome.about
        bench.use(NATIVE)
        longest = min(about["longest"] // 2, 4000) if not about["plain_cpu"] else min(about["longest"] // 2, 256)
        if self._job.traffic:
            requests = traffic.read(self._job.traffic, about["vocabulary"])
        else:  # sampling is outside of graphs, so it is recorded only if FlagGems runs everywhere
            requests = traffic.mix(about["vocabulary"], longest, sampled=about["scope"] == "everywhere")
        bench.ask("record")
        bench.send(requests)
        bench.show()
        if directory is not None:
            with suppress(FileNotFoundError):
                shutil.rmtree(directory)  # of a recording that was killed
            directory.mkdir()
        found: dict[str, Any] = bench.ask(
            "recorded", directory=directory and str(directory), labels=labels_of(bench.cases, about["scope"] == "everywhere")
        )
        self._recorded_by = bench.starts
        self._numbers = {_name(row): row["number"] for row in [*found["layers"], *found["functions"]]}
        return found

    def _record(self) -> None:
        self._step = "recording which layers and ATen functions are called"
        found = self._measured("record", "calls", partial(self._recording, self._calls))
        about, cases = self.outcome.about, set(labels_of(self._bench.cases, outside=True))
        layers: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(found["layers"], key=lambda row: -row["bytes"]):
            layers.setdefault(row["op"], []).append(row)
        for op, implementations in about["implementations"].items():
            for row in implementations:
                candidate = Candidate(op, row["impl"], row["packages"], calls_to_try(layers.get(op, []), cases))
                if row["why_not"]:
                    candidate.settle(UNAVAILABLE, row["why_not"])
                elif not candidate.calls:
                    candidate.settle(NOT_CALLED, "the traffic does not call the operator")
                self.outcome.candidates.append(candidate)
        functions: dict[str, list[dict[str, Any]]] = {}
        for row in found["functions"]:
            per_pass = {label: n for label, n in row["per_pass"].items() if about["scope"] == "everywhere" or self._is_in_graph(label)}
            if row["function"] is not None and per_pass:
                functions.setdefault(row["function"], []).append({**row, "per_pass": per_pass})
        off = os.environ.get("USE_FLAGGEMS", "").strip() == "0"
        self.outcome.candidates += [Candidate(name, None, ["flag_gems"], rows) for name, rows in functions.items() if not off]
        self.outcome.not_exercised = sorted({*OPERATORS, *about["implementations"]} - layers.keys())
        measures = self._job.baseline.measures
        self.outcome.candidates = [candidate for candidate in self.outcome.candidates if measures(candidate.entry)]

    def _is_in_graph(self, label: str) -> bool:
        """Whether the calls of a step are in a graph that SGLang replays."""
        return not label.endswith(" outside") and bool(self.outcome.about["graphs"][label.partition("/")[0]])

    @property
    def _open(self) -> list[Candidate]:
        """The candidates without a decision."""
        return [candidate for candidate in self.outcome.candidates if candidate.status == NOT_MEASURED]

    def _try(self) -> None:
        """Each candidate on the recorded calls, what weighs most first: checked in a process that may die, then timed in the engine."""
        queue = sorted(self._open, key=lambda candidate: candidate.share_of(self.outcome.step_us), reverse=True)
        rows = [(candidate, call) for candidate in queue for call in candidate.calls]
        self._step = f"checking and timing {len(queue)} candidates on recorded calls"
        numbers = {f"{candidate.key}: {_name(call)}": number for number, (candidate, call) in enumerate(rows)}
        with self.budget.part(_ALONE_SHARE):
            cases = [case_of(candidate, call) for candidate, call in rows]
            with Checker(cases, self._job.directory / "cases.json", self.budget.remaining) as checker:
                try:
                    for place, candidate in enumerate(queue):
                        self.budget.to_come |= dict.fromkeys(("check", "time"), sum(len(other.calls) for other in queue[place:]))
                        self._check(candidate, checker, numbers)
                        if candidate.status == NOT_MEASURED:
                            self._time(candidate)
                    with suppress(FileNotFoundError):
                        shutil.rmtree(self._calls)
                except BudgetOver as over:
                    self.outcome.incomplete = str(over)
        self.budget.to_come |= {"check": 0, "time": 0}
        for candidate in self._open:
            if candidate.ratio is None:
                candidate.settle(UNDECIDED, self.outcome.incomplete)

    def _check(self, candidate: Candidate, checker: Checker, numbers: Mapping[str, int]) -> None:
        """Its status says why not, if it is not right on a call."""
        for call in list(candidate.calls):
            name = f"{candidate.key}: {_name(call)}"
            file = call.get("file")
            if file and f"check: {name}" not in self._journal and not Path(file).is_file():
                raise SettingsError(f"{file} is missing, which {self._journal.path} needs: delete the latter to start again")
            found = self._measured("check", name, partial(checker.run, numbers[name]))
            status, message = found["status"], f"{found['message']} ({call['call']})"
            if status == TOO_LONG:
                candidate.settle(UNDECIDED, message)
            elif is_crash(status):
                candidate.settle(CRASHED, message)
            elif status == FAILED:
                candidate.settle(WRONG, message)
            elif status != OK and found["message"]:  # nothing can be said of this call, or SGLang's own computes it
                candidate.calls = [other for other in candidate.calls if other is not call]
                if not candidate.calls:
                    candidate.settle(UNDECIDED, f"nothing shows that it is right: {message}")
            if candidate.status != NOT_MEASURED:
                return

    def _time(self, candidate: Candidate) -> None:
        """Alone: the device in a replayed graph, and the host.

        While recording, graphs are set aside, so a call that SGLang makes between two graphs looks as if it were in one.
        Native's own cannot be captured then. A function that is in force only in graphs is never called there.
        """
        times: list[Timed] = []
        uncaptured = ""
        for call in list(candidate.calls):
            found = self._measured("time", f"{candidate.key}: {_name(call)}", partial(self._timing, candidate, call))
            if "crashed" in found:
                candidate.settle(CRASHED, f"{found['crashed']} ({call['call']})")
                return
            if candidate.impl is None and self.outcome.about["scope"] == "graphs" and (why := found.get("own", {}).get("uncaptured")):
                uncaptured = f"PyTorch's own call cannot be captured in a graph: {why} ({call['call']})"
                candidate.calls = [other for other in candidate.calls if other is not call]
                continue
            in_graph = any(map(self._is_in_graph, call["per_pass"]))
            row = timed(call, found["own"], found["theirs"], in_graph) if "own" in found else (UNDECIDED, found["error"])
            if isinstance(row, tuple):
                candidate.settle(row[0], f"{row[1]} ({call['call']})")
                return
            times.append(row)
        if times:
            outside = candidate.impl is not None or self.outcome.about["scope"] == "everywhere"
            judge_alone(candidate, times, self.outcome.step_us, outside)
        else:
            candidate.settle(OUTSIDE, uncaptured)

    def _timing(self, candidate: Candidate, call: Mapping[str, Any]) -> dict[str, Any]:
        """Time one call in the running engine. A new engine records the calls first."""
        if not self._bench.is_up or self._recorded_by != self._bench.starts:
            self._recording()
        try:
            number = self._numbers[_name(call)]
            if candidate.impl is None:
                return dict(self._bench.ask("time_function", number=number, rounds=ROUNDS))
            return dict(self._bench.ask("time_layer", number=number, impl=candidate.impl, rounds=ROUNDS))
        except CommandFailed as error:
            self._bench.stop()  # a failed capture may have left it unable to capture
            return {"error": str(error).splitlines()[0]}
        except EngineFailed as error:
            return {"crashed": str(error).splitlines()[0]}

    def _serve(self) -> None:
        """Measure choices in the running engine. If an operator's best candidate is slower served, try the next best."""
        served = Served(self._bench, self.outcome.noise, self.outcome.step_us, self._measured)
        queues: dict[str, list[Candidate]] = {}
        for candidate in sorted(self._open, key=lambda candidate: -candidate.gain):
            queues.setdefault(candidate.entry, []).append(candidate)
        self._step = f"serving with the candidates that are right and faster alone: {len(self._open)}"
        accepted: list[Candidate] = []
        try:
            while front := [queue.pop(0) for name, queue in queues.items() if queue and name not in {other.entry for other in accepted}]:
                accepted = served.settle([*accepted, *front])
        except BudgetOver as over:
            self._stopped(over)
            accepted = [candidate for candidate in self.outcome.candidates if candidate.status == USED]
        for candidate in self._open:
            best = next(other for other in accepted if other.entry == candidate.entry)
            candidate.settle(NOT_BEST, f"{candidate.reason}; {best.impl} saves more")
        self._choose()
        while self.outcome.used != NATIVE:
            try:
                self.outcome.served = served.measure(self.outcome.used)
                break
            except NotInForce as error:
                for candidate in accepted:
                    if candidate.entry in error.missing:
                        candidate.settle(WRONG, f"it cannot be used in the engine: {error.missing[candidate.entry]}")
                self.outcome.dropped |= {name: why for name, why in error.missing.items() if name in self.outcome.left}
            except EngineFailed as error:
                self._drop_one([one for one in accepted if one.status == USED], str(error).splitlines()[0])
            self._choose()

    def _drop_one(self, accepted: list[Candidate], error: str) -> None:
        """The engine ended with what was accepted and the earlier profile's choices together: drop these if they alone end it, too."""
        kept = self._kept()
        if accepted:
            with suppress(EngineFailed):
                self._bench.use(kept)
                self._bench.round(0)
                least = min(accepted, key=lambda candidate: candidate.gain)
                least.settle(CRASHED, f"{least.reason}; but the engine ended with it together with others: {error}")
                return
        self.outcome.dropped |= dict.fromkeys(kept.entries(), f"the engine ended with it: {error}")

    def _choose(self) -> None:
        """Use what was accepted, and the earlier profile's choice for what was not measured again, or is not decided yet."""
        outcome, baseline = self.outcome, self._job.baseline
        undecided = {candidate.entry for candidate in outcome.candidates if candidate.status in (UNDECIDED, NOT_MEASURED)}
        decided = {candidate.entry for candidate in outcome.candidates} - undecided
        replaced = decided if outcome.incomplete else decided | (baseline.only or set())
        outcome.dropped |= baseline.gone(outcome.about)
        if not outcome.incomplete:
            gone = baseline.entries.keys() & replaced - decided - undecided
            outcome.dropped |= {name: "the model does not call it any more" for name in gone if name not in outcome.dropped}
        outcome.left = frozenset(baseline.entries.keys() - replaced - outcome.dropped.keys())
        chosen = choice_of([one for one in outcome.candidates if one.status == USED and one.entry not in outcome.left])
        kept = self._kept()
        outcome.used = Choice.of({**dict(kept.impls), **dict(chosen.impls)}, [*kept.functions, *chosen.functions])

    def _kept(self) -> Choice:
        """The earlier profile's choices that stay."""
        choice, left = self._job.baseline.choice, self.outcome.left
        functions = [name for name in choice.functions if FUNCTION + name in left]
        return Choice.of({op: impl for op, impl in choice.impls if op in left}, functions)

    def confirm(self) -> None:
        """Measure the profile on fresh starts. If it is slower than native, leave everything to SGLang."""
        outcome = self.outcome
        if outcome.used == NATIVE:
            outcome.why_native = "" if outcome.incomplete else "nothing was right, faster alone and not slower served"
            return
        self.budget.to_come["pair"] = 0
        self._step = "fresh starts: native, tuned, tuned, native"
        profile = self._job.directory / "candidate.yaml"
        self._write(profile, outcome)
        found = confirm(self._bench, self._measured, profile, str(outcome.used), outcome.noise)
        if isinstance(found, str):
            status, outcome.why_native = UNDECIDED, f"on a fresh start the engine failed with it: {found}"
        else:
            outcome.confirmed = found
            status, outcome.why_native = found.verdict()
        if outcome.why_native:
            for candidate in outcome.candidates:
                if candidate.status == USED:
                    candidate.settle(status, f"{candidate.reason}; but {outcome.why_native}")
            outcome.used = NATIVE


def _name(call: Mapping[str, Any]) -> str:
    return f"{call.get('class') or call['key']} {call['call']}"
