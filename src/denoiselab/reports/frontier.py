"""The frontier of a run: what a sample costs against how good it is, as a table, a page and a figure.

A point is on the Pareto front if none that costs as much or less is better. There are two fronts, one for each cost:
network evaluations, which are the same everywhere, and seconds, which are those of one machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

HIGHER = ("is", "precision", "recall", "density", "coverage", "accuracy", "class_entropy", "class_diversity")
LOWER = ("fid", "fd", "fid_inf", "fd_inf", "sfid", "sfd", "kid", "kd", "copy_rate")
COSTS: dict[str, Callable[[Point], float]] = {"NFE": lambda point: point.nfe, "s": lambda point: point.seconds}


@dataclass(frozen=True)
class Point:
    """One way of sampling, measured.

    Args:
        sampler: its name.
        scale: of the guidance; 1 is none.
        budget: what was asked for: "8", "16, 17", "rtol 0.001".
        nfe: network evaluations per sample, guidance included; the mean over the samples, for a solver that chooses them.
        seconds: per image, of network and sampler; the median over the batches.
        value: what was measured.
        interval: of 95 %; None where there is none.
        floor: the value of real test images; None where there is none.
        jackknife: the value with each block of samples left out; None where there is none.
        count: of the samples behind the value.
        pruned: whether it was left at this count for better ones.
    """

    sampler: str
    scale: float
    budget: str
    nfe: float
    seconds: float
    value: float
    interval: tuple[float, float] | None = None
    floor: float | None = None
    jackknife: list[float] | None = None
    count: int = 0
    pruned: bool = False

    @property
    def uncertainty(self) -> float:
        """Half of a 95 % interval: of the given one, else of the block jackknife, else a tenth of the value.

        Source: of the jackknife's variance, (B − 1)/B·Σ(θ_b − mean)²: Efron & Tibshirani 1993, eq. 11.5.
        """
        if self.interval is not None:
            return (self.interval[1] - self.interval[0]) / 2
        if self.jackknife is None:
            return abs(self.value) / 10
        blocks = len(self.jackknife)
        mean = sum(self.jackknife) / blocks
        return 1.96 * math.sqrt((blocks - 1) / blocks * sum((left - mean) ** 2 for left in self.jackknife))


@dataclass(frozen=True)
class Skipped:
    """A way of sampling that cannot be, and why."""

    sampler: str
    scale: float
    budget: str
    reason: str


@dataclass(frozen=True)
class Frontier:
    """Measured points with what their number is.

    Args:
        metric: the number's name.
        points: measured at the full count, or pruned before it.
        skipped: what could not be measured.
        facts: what holds for every point, by name, for the page and below the figure.
    """

    metric: str
    points: Sequence[Point]
    skipped: Sequence[Skipped]
    facts: dict[str, Any]

    @property
    def measured(self) -> list[Point]:
        """The points that were not pruned."""
        return [point for point in self.points if not point.pruned]

    def front(self, cost: str) -> list[Point]:
        """The Pareto front for a key of `COSTS`, cheapest first."""
        return pareto(self.measured, COSTS[cost], higher=higher_is_better(self.metric))


def higher_is_better(metric: str) -> bool:
    """Whether large values of a number are good ones.

    Args:
        metric: its name, with or without extractor and count.

    Raises:
        ValueError: if neither large nor small values of it are good.
    """
    best = max((known for known in (*HIGHER, *LOWER) if f"{metric}_".startswith(f"{known}_")), key=len, default=None)
    if best is None:
        raise ValueError(f"metric={metric}: must be one that has a better end: {', '.join((*LOWER, *HIGHER))}")
    return best in HIGHER


def pareto(points: Sequence[Point], cost: Callable[[Point], float], *, higher: bool) -> list[Point]:
    """The points that are better than every other one of no more cost, cheapest first; of equal ones the first."""
    sign = -1 if higher else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), sign * point.value)):
        if math.isfinite(point.value) and (not front or sign * point.value < sign * front[-1].value):
            front.append(point)
    return front


def rungs(count: int, least: int) -> list[int]:
    """The sample counts of successive halving: an eighth, a quarter and a half of `count`, if at least `least`, and all."""
    return sorted({count // part for part in (8, 4, 2) if count // part >= least} | {count})


def survivors(points: Sequence[Point], *, higher: bool) -> list[Point]:
    """The points that go on to more samples, in order.

    One is left behind only if on both fronts a point that costs as much or less is better by more than both
    uncertainties together (the root of the sum of their squares).
    """
    sign = -1 if higher else 1

    def near(point: Point, cost: Callable[[Point], float]) -> bool:
        rivals = pareto([p for p in points if cost(p) <= cost(point)], cost, higher=higher)
        if not rivals:
            return True
        margin = math.hypot(point.uncertainty, rivals[-1].uncertainty)
        return sign * (point.value - rivals[-1].value) <= margin

    return [point for point in points if any(near(point, cost) for cost in COSTS.values())]
