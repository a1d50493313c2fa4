# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl bisect MODEL``: three passes over the same tokens, then trials of the suspicious replacements."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Settings
from ..model_run import Batch, CallFailed, Crashed, Hung, LoadedModel, ModelRun, Replacement, RunFailed
from ..model_run.processes import ranks_of
from ..trial import record_path
from . import passes
from .findings import Finding, rounding, suspicion
from .in_graphs import differences
from .not_judged import off_in, said_of
from .side_by_side import side_by_side
from .trials import MOST_TRIALS, Cause, Effect, Trial, effect, largest, listed, search

#: Verdicts, and the exit code of each.
NO_DIFFERENCE, FOUND, NO_OPERATOR, UNDECIDED = "no difference", "found", "no operator", "undecided"
EXIT_CODES = {NO_DIFFERENCE: 0, FOUND: 1, NO_OPERATOR: 3, UNDECIDED: 4}
_ROUNDED_TRIALS = 2
#: Server arguments. The KV cache is small, since operators' inputs are copied.
ARGUMENTS = ("--max-total-tokens", "8192")
#: glibc keeps freed memory. Else each large float64 array would be mapped anew, which takes longer than the computation.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


@dataclass(frozen=True)
class Job:
    """What to bisect.

    Attributes:
        arguments: arguments of an SGLang server.
        prompts: empty: a default set.
        limit: the time limit of a pass, in seconds.
        archives: a directory for archives with the inputs of wrong calls.
        off: FlagGems functions that the settings select and that cannot be judged. The model is loaded without any.
    """

    model: str
    settings: Settings
    arguments: Sequence[str] = ()
    prompts: Sequence[str] = ()
    limit: float = 600.0
    archives: Path | None = None
    off: tuple[Replacement, ...] = ()


@dataclass
class Report:
    """The result.

    Attributes:
        verdict: a key of EXIT_CODES.
        message: the verdict in one or two sentences.
        culprits: the replacements that change the output: all if ``verdict`` is FOUND, else those that were found.
            ``together``: two that change it only together.
        settings: those in force.
        facts: about the model in its process.
        noise, whole: the change of log-probabilities by rounding alone, and by the settings in force.
        in_graphs: the change by the settings in force in graph replays. None: no graphs, or a difference was found without them.
        findings: one for each layer, batch and phase.
        not_used: implementations and FlagGems functions that the settings prefer and that are not used -> why.
        not_judged: replacements that the settings select, and whose calls could not be judged -> why. Those that are none of
            ``replacements`` were off.
        trials: the trials that were run.
        loads: how often the model was loaded.
    """

    model: str
    verdict: str = UNDECIDED
    message: str = ""
    culprits: tuple[Replacement, ...] = ()
    together: bool = False
    settings: Settings = field(default_factory=Settings)
    facts: dict[str, str] = field(default_factory=dict)
    replacements: tuple[Replacement, ...] = ()
    noise: Effect | None = None
    whole: Effect | None = None
    in_graphs: Effect | None = None
    findings: list[Finding] = field(default_factory=list)
    not_used: dict[str, str] = field(default_factory=dict)
    not_judged: dict[Replacement, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    loads: int = 0

    @property
    def off(self) -> list[Replacement]:
        """What the settings select and was off, since it cannot be judged."""
        return [one for one in self.not_judged if one not in self.replacements]

    @property
    def archives(self) -> list[str]:
        """The culprits' archives."""
        return [one.archive for one in self.findings if one.archive and one.replacement in self.culprits]

    def of(self, replacement: Replacement) -> list[Finding]:
        """A replacement's wrong findings, or else those that differ most. Worst first."""
        found = [finding for finding in self.findings if finding.replacement == replacement]
        return sorted(found, key=lambda one: (one.problem is None, -one.used))


#: Shows the current step.
Show = Callable[[str], None]


def bisect(job: Job, show: Show) -> Report:
    """Find the replacement that changes a model's output.

    Raises:
        RunFailed: the model could not be loaded, or a call raised.
    """
    return _Bisection(job, show).run()


def bisect_loaded(model: LoadedModel, job: Job, show: Show) -> Report:
    """The same with a loaded model whose settings are in force. A crash or hang is not examined.

    Raises:
        RunFailed: a process ended, or a call raised.
    """
    bisection = _Bisection(job, show)
    with tempfile.TemporaryDirectory(prefix="sglang-fl-bisect-") as directory:
        bisection.measure(model, directory)
    return bisection.report


class _Bisection:
    def __init__(self, job: Job, show: Show):
        self._job, self._show = job, show
        self.report = Report(job.model, settings=job.settings)
        self._batches: list[Batch] = []

    def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="sglang-fl-bisect-") as directory:
            try:
                with self._load(directory) as model:
                    self.measure(model, directory)
                if self.report.verdict == FOUND and self.report.in_graphs is not None and ranks_of(self._job.arguments) > 1:
                    self._on_one_rank(directory)
            except RunFailed as error:
                self._after_an_end(error, Path(directory))
        return self.report

    def _load(self, directory: str, *more: str) -> LoadedModel:
        """A model to load. It has a copy of the trial record: a crash in this process must not exclude anything from servers."""
        self._show("loading the model" if not self.report.loads else "loading the model again")
        self.report.loads += 1
        record = Path(directory) / f"trials-{self.report.loads}.json"
        kept = record_path(self._job.settings)
        if kept.exists():
            shutil.copyfile(kept, record)
        environ = {"SGLANG_FL_TRIAL_RECORD": str(record), "SGLANG_FL_FLAGOS_SCOPE": "everywhere", **_KEEP_MEMORY}
        if self._job.off:
            environ["USE_FLAGGEMS"] = "0"
        return LoadedModel(self._job.model, [*ARGUMENTS, *self._job.arguments, *more], environ)

    def measure(self, model: LoadedModel, directory: str) -> None:
        self._measure(model, directory)
        report = self.report
        if report.off:
            if report.verdict == NO_DIFFERENCE or not report.replacements:
                report.verdict = UNDECIDED
            report.message = f"{report.message} {said_of(len(report.off))}"

    def _measure(self, model: LoadedModel, directory: str) -> None:
        report, job = self.report, self._job
        selected, report.facts, self._batches = self._call(model, about, list(job.prompts))
        report.not_judged = self._call(model, off_in, job.off)
        report.replacements = tuple(one for one in selected if one not in report.not_judged)
        report.not_used = self._call(model, not_used)
        self._show("pass 1 of 3: everything left to SGLang")
        native = self._run(model, ())
        if not report.replacements:
            nothing = "no operator of a layer" if report.off else "nothing"
            report.verdict, report.message = NO_OPERATOR, f"With these settings sglang-fl replaces {nothing} in this model."
            return
        self._show(f"pass 2 of 3: the settings in force{', without FlagGems functions' if report.off else ''}")
        in_force = self._call(model, passes.with_only, self._batches, report.replacements, directory)
        report.not_used = self._call(model, not_used)  # first calls of FlagGems functions may have failed
        self._show("pass 3 of 3: each replacement compared with SGLang's own and float64")
        archives = str(job.archives) if job.archives else None
        by_rank = model.call(side_by_side, self._batches, report.replacements, archives, limit=4 * job.limit)
        report.findings = [finding for _, findings, _ in by_rank for finding in findings]
        for _, _, not_judged in by_rank:
            report.not_judged |= not_judged
        again = by_rank[0][0]
        report.whole = effect(native, in_force)
        self._judge(model, native, effect(native, again))
        if report.verdict == NO_DIFFERENCE:
            self._in_graphs(model, directory)

    def _judge(self, model: LoadedModel, native: Mapping[str, Any], repeat: Effect) -> None:
        report = self.report
        assert report.whole is not None
        ulps = rounding(report.findings)
        rounded = [Effect()]
        for number in range(_ROUNDED_TRIALS if ulps else 0):
            self._show(f"measuring the effect of rounding: {number + 1} of {_ROUNDED_TRIALS}")
            rounded.append(effect(native, self._call(model, passes.rounded_otherwise, self._batches, ulps, number)))
        report.noise = largest(*rounded, repeat)
        if repeat.is_beyond(largest(*rounded)):
            report.verdict = NO_OPERATOR
            report.message = (
                "It is no operator of sglang-fl: with everything left to SGLang, the log-probabilities of the same tokens differ "
                f"by up to {repeat.worst:.2g} from run to run."
            )
        elif not report.whole.is_beyond(report.noise):
            report.verdict = NO_DIFFERENCE
            report.message = (
                f"Log-probabilities change by up to {report.whole.worst:.2g}. "
                f"Rounding SGLang's own results differently changes them by up to {report.noise.worst:.2g}."
            )
        else:
            self._find(report.whole, lambda on: effect(native, self._run(model, on)))
            if report.verdict == FOUND:
                report.message = f"{report.message} {self._where()}".rstrip()

    def _in_graphs(self, model: LoadedModel, directory: str) -> None:
        """Compare graph replays. No Python runs in them, so each trial switches replacements and captures the graphs again."""
        report = self.report
        assert report.noise is not None
        try:
            self._show("graphs: everything left to SGLang")
            replayed, native = self._captured(model, ())
            report.facts["graphs"] = ", ".join(replayed) or "none"
            if not replayed:
                return
            self._show("graphs: the settings in force")
            _, in_force = self._call(model, passes.in_graphs, self._batches, report.replacements, directory)
        except CallFailed as error:  # a server captures again without what failed
            report.message += f" Graphs could not be captured: {str(error).splitlines()[0]}"
            return
        report.in_graphs = effect(native, in_force)
        again = effect({batch.name: native[batch.name + passes.AGAIN] for batch in self._batches}, native)
        if again.is_beyond(report.noise):
            report.verdict = NO_OPERATOR
            report.message = (
                "It is no operator of sglang-fl: with everything left to SGLang, the log-probabilities of the same tokens differ "
                f"by up to {again.worst:.2g} between replays of a graph."
            )
        elif report.in_graphs.is_beyond(report.noise):
            self._find(report.in_graphs, lambda on: effect(native, self._captured(model, on)[1]))
            report.message = f"Only in graphs: {report.message}"
            if report.verdict == FOUND:
                self._show("graphs: which replays")
                other = self._captured(model, report.culprits)[1]
                report.message += " " + differences(native, other, report.noise, self._batches, replayed)
        else:
            report.message += f" In graphs ({' and '.join(replayed)}) log-probabilities change by up to {report.in_graphs.worst:.2g}."

    def _captured(self, model: LoadedModel, on: Collection[Replacement]) -> tuple[tuple[str, ...], Any]:
        found: tuple[tuple[str, ...], Any] = self._call(model, passes.in_graphs, self._batches, tuple(on))
        return found

    def _on_one_rank(self, directory: str) -> None:
        """Find out whether the fault needs several ranks."""
        report = self.report
        assert report.noise is not None
        try:
            with self._load(directory, "--tp", "1") as model:
                self._show(f"graphs on one rank: trial with {listed(frozenset(report.culprits), report.replacements)}")
                _, native = self._captured(model, ())
                _, other = self._captured(model, report.culprits)
        except CallFailed:
            report.message += " Whether it needs several ranks is unknown: the model does not run with --tp 1."
            return
        if not effect(native, other).is_beyond(report.noise):
            report.message += " It needs several ranks: with --tp 1 the output does not change."

    def _find(self, whole: Effect, measure: Callable[[frozenset[Replacement]], Effect]) -> None:
        """Find the replacements that are necessary and sufficient for an effect."""
        report = self.report
        assert report.noise is not None

        def shown(on: frozenset[Replacement]) -> Effect:
            self._show(f"trial with {listed(on, report.replacements)}")
            return measure(on)

        left = MOST_TRIALS - _ROUNDED_TRIALS
        cause = search(suspicion(report.findings), whole, report.noise, shown, left, report.trials.append)
        if cause.complete and (sglangs := self._sglangs_own(cause.replacements)):
            report.verdict = NO_OPERATOR
            report.message = (
                f"It is no operator of sglang-fl: SGLang's own {sglangs.replacement.name} is wrong ({sglangs.where}: "
                f"{sglangs.native_used:.0f} times the bound). {sglangs.replacement.by}, which replaces it, is right."
            )
            return
        report.verdict, report.culprits = FOUND if cause.complete else UNDECIDED, cause.replacements
        report.together = [len(part) for part in cause.parts] == [2]
        report.message = self._proof(cause)

    def _proof(self, cause: Cause) -> str:
        """What the trials have shown."""
        if not cause.parts:
            return (
                f"The output changes beyond the noise. In {len(self.report.trials)} trials no single replacement and no two of them were "
                "shown to be the cause. The table lists the replacements nearest to their bounds."
            )
        proofs = [f"{' and '.join(map(str, part))}: the output changes only with both on" for part in cause.parts if len(part) > 1]
        if single := [str(part[0]) for part in cause.parts if len(part) == 1]:
            alone = "the output changes with only this on" if len(single) == 1 else "each of them changes the output alone"
            proofs.insert(0, f"{' and '.join(single)}: {alone}")
        if not cause.complete:
            return (
                f"{'; '.join(proofs)}. But {len(self.report.trials)} trials did not show that this is all. "
                "Leave them to SGLang, as below, and run bisect again."
            )
        if len(cause.replacements) > 1 and not self.report.together:
            proofs.append("with all of them off it is right")
        return f"{'; '.join(proofs)}{', and is right with only this off' if len(cause.replacements) == 1 else ''}."

    def _sglangs_own(self, culprits: Sequence[Replacement]) -> Finding | None:
        """The finding where SGLang's own result is wrong, if ours is right in all calls."""
        found = [finding for finding in self.report.findings if finding.replacement in culprits]
        if any(finding.problem is not None for finding in found):
            return None
        wrong = [finding for finding in found if finding.native_is_wrong]
        return max(wrong, key=lambda finding: finding.native_used, default=None)

    def _where(self) -> str:
        found = [finding for finding in self.report.findings if finding.replacement in self.report.culprits and finding.problem is not None]
        ranks = {finding.rank for finding in found}
        if not found:
            return "Each single call is right on SGLang's own inputs."
        only = f" only on rank {ranks.pop()}," if len(ranks) == 1 and "tp_size" in self.report.facts else ""
        first = found[0]
        which = "It" if len(self.report.culprits) == 1 else first.replacement.name
        return f"{which} is wrong{only} first in call {first.call} of {first.where}: {first.problem}."

    def _run(self, model: LoadedModel, on: Collection[Replacement]) -> Any:
        return self._call(model, passes.with_only, self._batches, tuple(on))

    def _call(self, model: LoadedModel, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in each rank. Returns the first rank's result, which is that of all."""
        return model.call(function, *args, limit=self._job.limit)[0]

    def _after_an_end(self, error: RunFailed, directory: Path) -> None:
        """After a crash, a hang or an error with the settings in force: test whether the replacement that was running causes it."""
        report = self.report
        how = {Crashed: "crashes", Hung: "hangs", CallFailed: "raises an error"}[type(error)]
        trace = passes.read_trace(directory, error.rank)
        culprit = next((one for one in report.replacements if trace and str(one) == trace[0]), None)
        if culprit is None:
            raise error
        where = trace[1] if trace else ""
        run = passes.in_graphs if where.endswith(passes.CAPTURE) else passes.with_only
        alone = self._ends(directory, run, [culprit], type(error))
        others = self._ends(directory, run, [one for one in report.replacements if one != culprit], type(error))
        report.culprits = (culprit,) if alone else ()
        if alone and not others:
            report.verdict = FOUND
            report.message = f"{culprit} {how} in {where}, with only this on, and not with only this off ({error})."
        else:
            report.verdict = UNDECIDED
            not_all = "but not with only this on" if not alone else "but also with only this off"
            report.message = f"The model {how} while {culprit} runs ({where}), {not_all}: {error}"

    def _ends(self, directory: Path, run: Callable[..., Any], on: Sequence[Replacement], kind: type[Exception]) -> bool:
        """Whether the model crashes, hangs or raises an error, as before, with these on, in a new process."""
        ended = False
        with self._load(str(directory)) as model:
            self._show(f"trial with {listed(frozenset(on), self.report.replacements)}")
            try:
                self._call(model, run, self._batches, tuple(on))
            except RunFailed as error:
                ended = isinstance(error, kind)
        self.report.trials.append(Trial(frozenset(on), None, ended))
        return ended


def not_used(run: ModelRun) -> dict[str, str]:
    """What the settings prefer in the model and is not used -> why."""
    return run.switches.refused()


def about(run: ModelRun, prompts: list[str]) -> tuple[tuple[Replacement, ...], dict[str, str], list[Batch]]:
    """The model's replacements, facts for the report, and the batches to run."""
    config = run.runner.model_config
    facts = {
        "model": type(run.model).__name__,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": str(run.runner.device),
        "attention_backend": str(run.runner.attn_backend.__class__.__name__),
    }
    if run.server_args.tp_size > 1:
        facts["tp_size"] = str(run.server_args.tp_size)
    return run.switches.replacements, facts, passes.batches(run, prompts)
