# SPDX-License-Identifier: Apache-2.0
"""Finds the switch that makes a run fail: a Bayesian group search in which any result may be wrong.

It follows flake-aware culprit finding (ICST 2023): keep a probability for each hypothesis, choose the run with the highest expected
information, and stop when one hypothesis is likely enough. The rates of false failures and of false successes are unknown, so the
likelihood integrates over both. Each result is also evidence of these rates.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache

#: The odds at which a verdict is given.
ODDS = 99.0
#: Prior probabilities: no operator is the cause, nothing fails, the results do not depend on the switches. The rest: one switch is
#: the cause. With pairs, these parts of the rest: both of two are needed, either of two is enough.
_NO_OPERATOR, _NOTHING, _UNRELATED = 0.10, 0.05, 0.02
_TWO_NEEDED, _EITHER = 0.2, 0.2
#: This part of the prior weights is spread evenly, so that a wrong weight costs about one run.
_EVEN = 0.5
#: The prior of a rate of wrong results, as points: Beta(1, 16), mean 6 %, cut off at one half, where a result says nothing.
_RATES = tuple((point + 0.5) * 0.005 for point in range(80))
_RATE_WEIGHTS = tuple((1 - rate) ** 15 for rate in _RATES)
#: The probability of a wrong result with ``truthful``, and the Beta parameter of the failure rate of unrelated results.
_NEVER, _UNRELATED_COUNT = 1e-12, 10


@dataclass(frozen=True)
class Hypothesis:
    """A run fails if at least ``needed`` of ``switches`` are on. Without switches it fails always (0) or never (1)."""

    switches: tuple[str, ...] = ()
    needed: int = 1


NO_OPERATOR, NOTHING = Hypothesis(needed=0), Hypothesis()


@dataclass(frozen=True)
class Verdict:
    """The conclusion from the results.

    Attributes:
        cause: the hypothesis. None: none fits, because results are wrong too often or more switches act together.
        odds: in its favour, against all others.
    """

    cause: Hypothesis | None
    odds: float


class Search:
    """Chooses the runs and draws the conclusion.

    Args:
        weights: the switches, each with its relative prior weight.
        truthful: no result is ever wrong.
        pairs: two switches may be the cause: both are needed, or either is enough.
        seed: the same seed chooses the same runs.

    Attributes:
        runs: (switches that were on, failed) of each run. failed is None if it could not be judged.
    """

    def __init__(self, weights: Mapping[str, float], *, truthful: bool = False, pairs: bool = False, seed: int = 0):
        if not weights or min(weights.values()) < 0:
            raise ValueError("a search needs switches, none with a weight below 0")
        self.weights, self.truthful, self.pairs, self.seed = dict(weights), truthful, pairs, seed
        self.switches = tuple(weights)
        self.runs: list[tuple[frozenset[str], bool | None]] = []
        self._bit = {switch: 1 << number for number, switch in enumerate(self.switches)}
        self._hypotheses, self._priors = _hypotheses(self.weights, pairs)
        self._masks = [self._mask(hypothesis.switches) for hypothesis in self._hypotheses]
        self._of: dict[str, list[int]] = {switch: [] for switch in self.switches}
        for number, hypothesis in enumerate(self._hypotheses):
            for switch in hypothesis.switches:
                self._of[switch].append(number)
        # How many of the failures and of the successes each hypothesis predicts to fail.
        self._counts = [(0, 0)] * len(self._hypotheses)
        self._failed = self._passed = 0
        self._judge()

    def record(self, on: Set[str], failed: bool | None) -> None:
        """Record a result. None: the run could not be judged, and is not chosen again.

        Raises:
            ValueError: there is no such switch.
        """
        if unknown := set(on) - self._bit.keys():
            raise ValueError(f"not switches of this search: {', '.join(sorted(unknown))}")
        self.runs.append((frozenset(on), failed))
        if failed is None:
            return
        mask = self._mask(on)
        step = (1, 0) if failed else (0, 1)
        for number, hypothesis in enumerate(self._hypotheses):
            if (self._masks[number] & mask).bit_count() >= hypothesis.needed:
                failures, successes = self._counts[number]
                self._counts[number] = (failures + step[0], successes + step[1])
        self._failed, self._passed = self._failed + step[0], self._passed + step[1]
        self._judge()

    def next(self) -> frozenset[str]:
        """The switches to leave on in the next run."""
        everything: frozenset[str] = frozenset(self.switches)
        asked = {on for on, _ in self.runs}
        if not self.truthful:
            for opening in (everything, frozenset[str]()):
                if opening not in asked:
                    return opening
        best = max(range(len(self._hypotheses)), key=self._posterior.__getitem__)
        if self._posterior[best] >= 0.5 and (unproven := next(self._unproven(self._hypotheses[best]), None)) is not None:
            return unproven
        return self._most_telling()

    def verdict(self) -> Verdict | None:
        """The verdict, or None if more runs are needed.

        Switches are named only after runs have shown that they are sufficient and that each is necessary.
        """
        best = max(range(len(self._hypotheses)), key=self._posterior.__getitem__)
        likely = self._posterior[best]
        if self._unrelated > likely:
            odds = self._unrelated / max(math.fsum(self._posterior), 1e-300)
            return Verdict(None, odds) if odds >= ODDS else None
        others = math.fsum((*self._posterior[:best], *self._posterior[best + 1 :], self._unrelated))
        odds, cause = likely / max(others, 1e-300), self._hypotheses[best]
        return Verdict(cause, odds) if odds >= ODDS and next(self._unproven(cause), None) is None else None

    def likeliest(self, count: int) -> list[tuple[Hypothesis, float]]:
        """The hypotheses with the highest probabilities."""
        ranked = sorted(range(len(self._hypotheses)), key=lambda number: -self._posterior[number])
        return [(self._hypotheses[number], self._posterior[number]) for number in ranked[:count]]

    def wrong_answers(self, cause: Hypothesis) -> tuple[tuple[int, int], tuple[int, int]]:
        """(wrong results, all results) under a hypothesis, for runs that should pass and for runs that should fail."""
        due = [(len(on & set(cause.switches)) >= cause.needed, failed) for on, failed in self.runs if failed is not None]
        passes, failures = [failed for bad, failed in due if not bad], [failed for bad, failed in due if bad]
        return (sum(passes), len(passes)), (failures.count(False), len(failures))

    def _mask(self, switches: Set[str] | Sequence[str]) -> int:
        return sum(self._bit[switch] for switch in switches)

    def _judge(self) -> None:
        """The probability of each hypothesis after the results so far."""
        likelihoods = {counts: self._likelihood(*counts) for counts in set(self._counts)}
        joint = [prior * likelihoods[counts] for prior, counts in zip(self._priors, self._counts, strict=True)]
        unrelated = (_NEVER**0.5 if self.truthful else _UNRELATED) * _unrelated(self._failed, self._passed)
        total = math.fsum(joint) + unrelated
        self._posterior, self._unrelated = [part / total for part in joint], unrelated / total

    def _likelihood(self, failures: int, successes: int) -> float:
        """The likelihood of the results under a hypothesis that predicts to fail this many of the failures and of the successes."""
        return self._chance(successes, failures) * self._chance(self._failed - failures, self._passed - successes)

    def _chance(self, wrong: int, right: int) -> float:
        return _NEVER**wrong if self.truthful else _with_unknown_rate(wrong, right)

    def _forecasts(self, failures: int, successes: int) -> tuple[float, float]:
        """The probability of a failure where the hypothesis predicts a success, and where it predicts a failure."""
        right, wrong = self._passed - successes, self._failed - failures
        where_success = self._chance(wrong + 1, right) / self._chance(wrong, right)
        return where_success, 1 - self._chance(successes + 1, failures) / self._chance(successes, failures)

    def _unproven(self, cause: Hypothesis) -> Iterator[frozenset[str]]:
        """The runs, still missing, that would show directly that these switches are the cause."""
        everything, switches = frozenset(self.switches), cause.switches
        enough = [frozenset(switches)] if cause.needed == len(switches) else [frozenset((switch,)) for switch in switches]
        cures = [everything - {switch} for switch in switches] if cause.needed == len(switches) else [everything - set(switches)]
        for on, expected in (*((on, True) for on in enough), *((on, False) for on in cures)):
            answers = [failed for asked, failed in self.runs if asked == on]
            if None not in answers and answers.count(expected) <= answers.count(not expected):
                yield on

    def _most_telling(self) -> frozenset[str]:
        """The set of switches whose run has the highest expected information, among prefixes of all switches by likelihood."""
        likely = {switch: math.fsum(self._posterior[number] for number in self._of[switch]) for switch in self.switches}
        order = list(self.switches)
        random.Random(f"{self.seed} {len(self.runs)}").shuffle(order)
        order.sort(key=lambda switch: -likely[switch])
        unjudged = {on for on, failed in self.runs if failed is None}
        sizes = ((*self._best_size(way, unjudged), way) for way in (order, order[::-1]))
        _, size, way = max(sizes, key=lambda found: found[0])
        return frozenset(way[:size])

    def _best_size(self, order: Sequence[str], unjudged: Set[frozenset[str]]) -> tuple[float, int]:
        """How many switches of an order to leave on, and the expected information of that run in bits."""
        posterior, kinds = self._posterior, self._counts
        forecasts = {counts: self._forecasts(*counts) for counts in set(kinds)}
        uncertain = {counts: (_bits(passes), _bits(fails)) for counts, (passes, fails) in forecasts.items()}
        # The change of both sums below when a hypothesis starts to predict a failure.
        steps = {counts: (forecasts[counts][1] - forecasts[counts][0], uncertain[counts][1] - uncertain[counts][0]) for counts in forecasts}
        missing = [hypothesis.needed for hypothesis in self._hypotheses]
        unrelated = (_UNRELATED_COUNT + self._failed) / (2 * _UNRELATED_COUNT + self._failed + self._passed)
        # The probability of a failure, and the entropy of the result given the right hypothesis.
        failure, noise = self._unrelated * unrelated, self._unrelated * _bits(unrelated)
        for needed, counts, likely in zip(missing, kinds, posterior, strict=True):
            failure += likely * forecasts[counts][needed == 0]
            noise += likely * uncertain[counts][needed == 0]
        best = (-1.0 if frozenset() in unjudged else _bits(failure) - noise, 0)
        for size, switch in enumerate(order, 1):
            for number in self._of[switch]:
                missing[number] -= 1
                if missing[number] == 0:
                    step, likely = steps[kinds[number]], posterior[number]
                    failure += likely * step[0]
                    noise += likely * step[1]
            told = _bits(failure) - noise
            if told > best[0] + 1e-12 and not (unjudged and frozenset(order[:size]) in unjudged):
                best = (told, size)
        return best


def _hypotheses(weights: Mapping[str, float], pairs: bool) -> tuple[list[Hypothesis], list[float]]:
    """All hypotheses with their prior probabilities."""
    total = sum(weights.values())
    share = {name: _EVEN / len(weights) + (1 - _EVEN) * (weight / total if total else 1 / len(weights)) for name, weight in weights.items()}
    believed = [(Hypothesis((name,)), part) for name, part in share.items()]
    names = list(share)
    if pairs and len(names) > 1:
        both = [((a, b), share[a] * share[b]) for number, a in enumerate(names) for b in names[:number]]
        scale = math.fsum(part for _, part in both)
        believed = [(one, part * (1 - _TWO_NEEDED - _EITHER)) for one, part in believed]
        believed += [(Hypothesis(two, 2), part / scale * _TWO_NEEDED) for two, part in both]
        believed += [(Hypothesis(two, 1), part / scale * _EITHER) for two, part in both]
    rest = 1 - _NO_OPERATOR - _NOTHING - _UNRELATED
    believed = [(one, part * rest) for one, part in believed]
    believed += [(NO_OPERATOR, _NO_OPERATOR), (NOTHING, _NOTHING)]
    return [hypothesis for hypothesis, _ in believed], [part for _, part in believed]


@cache
def _with_unknown_rate(wrong: int, right: int) -> float:
    """The probability of results, each wrong at an unknown rate."""
    points = zip(_RATES, _RATE_WEIGHTS, strict=True)
    return math.fsum(weight * rate**wrong * (1 - rate) ** right for rate, weight in points) / math.fsum(_RATE_WEIGHTS)


@cache
def _unrelated(failed: int, passed: int) -> float:
    """The probability of results that do not depend on the switches: a Beta-distributed failure rate around one half."""
    count = _UNRELATED_COUNT

    def log_beta(a: int, b: int) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    return math.exp(log_beta(count + failed, count + passed) - log_beta(count, count))


def _bits(probability: float) -> float:
    """The entropy of a binary result."""
    if not 0 < probability < 1:
        return 0.0
    return -probability * math.log2(probability) - (1 - probability) * math.log2(1 - probability)
