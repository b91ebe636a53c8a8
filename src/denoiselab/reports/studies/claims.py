"""Claims, and the rule by which they are judged.

A claim says of several differences that all of them are positive. Each difference gets an interval, and the intervals hold
simultaneously at 95 %: of K differences each one's is of 1 − 0.05/K (Bonferroni). Then, stated before anything is measured:

- **refuted**: at least one interval lies below zero;
- **confirmed**: all intervals lie above zero;
- **undecided**: anything else.

What is computed exactly has an interval without width, so that it is confirmed or refuted (a difference of zero: undecided).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from denoiselab.evaluation.intervals import LEVEL, quantile, wilson

Verdict = Literal["confirmed", "refuted", "undecided"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Something that a claim says is positive.

    Args:
        what: in a few words.
        value: the estimate.
        interval: its interval of a level in (0, 1).
    """

    what: str
    value: float
    interval: Callable[[float], Interval]


def estimated(what: str, value: float, error: float, freedom: int | None = None) -> Difference:
    """A difference with a standard error, which is 0 if it is computed exactly."""

    def interval(level: float) -> Interval:
        half = quantile(freedom, level) * error
        return value - half, value + half

    return Difference(what, value, interval)


def shares(what: str, first: tuple[int, int], second: tuple[int, int], margin: float = 0.0) -> Difference:
    """One share less another one, plus a margin; each is (successes, count) of independent draws.

    Source: Newcombe 1998, method 10.
    """
    (p, q), added = (k / n for k, n in (first, second)), margin

    def interval(level: float) -> Interval:
        (low, high), (other_low, other_high) = wilson(p, first[1], level), wilson(q, second[1], level)
        below, above = math.hypot(p - low, other_high - q), math.hypot(high - p, q - other_low)
        return p - q + added - below, p - q + added + above

    return Difference(what, p - q + added, interval)


def above(what: str, share: tuple[int, int], bound: float) -> Difference:
    """A share (successes, count) less a bound."""
    found = share[0] / share[1]

    def interval(level: float) -> Interval:
        low, high = wilson(found, share[1], level)
        return low - bound, high - bound

    return Difference(what, found - bound, interval)


@dataclass(frozen=True)
class Claim:
    """A claim about one set of data.

    Args:
        text: what is claimed, one sentence.
        on: which data it is about.
        differences: what must be positive for it to hold, at least one.
    """

    text: str
    on: str
    differences: Sequence[Difference]

    @property
    def intervals(self) -> list[Interval]:
        """Of the differences, holding together at 95 %."""
        level = 1 - (1 - LEVEL) / len(self.differences)
        return [difference.interval(level) for difference in self.differences]

    @property
    def verdict(self) -> Verdict:
        """By the rule above."""
        intervals = self.intervals
        if any(high < 0 for _, high in intervals):
            return "refuted"
        return "confirmed" if all(low > 0 for low, _ in intervals) else "undecided"

    @property
    def counts(self) -> str:
        """How many intervals lie above zero, and how many below."""
        over, under = sum(low > 0 for low, _ in self.intervals), sum(high < 0 for _, high in self.intervals)
        return f"{over} of {len(self.differences)} above zero, {under} below"

    @property
    def worst(self) -> str:
        """The difference whose interval reaches lowest."""
        difference, (low, high) = min(zip(self.differences, self.intervals, strict=True), key=lambda pair: pair[1])
        return f"{difference.what}: {difference.value:+.3g} [{low:+.3g}, {high:+.3g}]"
