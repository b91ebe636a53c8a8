"""Runs side by side: means over training seeds with their intervals, and differences to the first row.

What an interval knows differs. Over training seeds (Student's t) it knows how much another training would give. The interval
of one number (a jackknife over blocks of samples, Wilson's for a share) knows the draw of the samples alone. Differences are

- paired by training seed where two rows share at least two: t over the differences seed by seed;
- paired by block where two single runs were measured on the same noise and labels, block b of one beside block b of the
  other, by the jackknife over the differences of what is left without them (Efron & Stein 1981);
- else unpaired: the two intervals' arms in quadrature (Zou & Donner 2008, §2), which holds for lopsided intervals too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from denoiselab.evaluation.intervals import jackknife_interval, mean_interval
from denoiselab.evaluation.records import Number
from denoiselab.reports.measured_runs import SEED, MeasuredRun, check_protocols, columns_of, identity, row_names

SEEDS, BLOCKS, UNPAIRED, BARE = (
    "paired by training seed, over the seeds that both rows have",
    "paired by block of samples, drawn from the same noise: another training seed would move them further",
    "unpaired, the two intervals combined in quadrature",
    "without an interval",
)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """A row's value in one column.

    Args:
        value: of the one run, or the mean over training seeds.
        interval: of 95 %, over the seeds where there are several, else the number's own; None where there is none.
        n: how many runs it is the mean of.
    """

    value: float
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A row's value less the first row's.

    Args:
        value: the difference.
        interval: of 95 %; None where none would be honest.
        how: SEEDS, BLOCKS, UNPAIRED or BARE.
    """

    value: float
    interval: Interval | None
    how: str

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Row:
    """Runs that differ in their training seed alone.

    Args:
        name: what differs from the other rows.
        runs: one for each seed.
        cells: by column.
        differences: to the first row, by column; empty in the first.
    """

    name: str
    runs: list[MeasuredRun]
    cells: dict[str, Cell]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class Comparison:
    """The table.

    Args:
        columns: names of the numbers.
        rows: the first is what the others are compared with.
        floors: the value of real test images, where all runs agree on it.
        notes: what is missing or left out, a line each.
    """

    columns: list[str]
    rows: list[Row]
    floors: dict[str, float]
    notes: list[str]

    def numbers(self) -> list[Number]:
        """Every number that stands in the table."""
        runs = [run for row in self.rows for run in row.runs]
        return [run.numbers[column] for column in self.columns for run in runs if column in run.numbers]


def side_by_side(
    runs: Sequence[MeasuredRun], *, vary: Sequence[str], columns: Sequence[str] | None = None
) -> Comparison:
    """Put runs side by side.

    Args:
        runs: in the order in which rows are wanted, at least one.
        vary: fields of the protocol that may differ.
        columns: names of the numbers that are wanted; None takes all.

    Raises:
        UnlikeError: if a column's numbers have unlike protocols.
        ValueError: if `vary` names what is in no protocol.
    """
    notes: list[str] = []
    if "weights" not in vary:
        runs = _one_kind_of_weights(runs, notes)
    wanted = columns_of(runs) if columns is None else list(columns)
    runs = [_only(run, wanted) for run in runs]
    check_protocols(runs, vary)
    groups = _groups(runs, vary, notes)
    rows: list[Row] = []
    first: dict[str, dict[int | None, Number]] = {}
    for name, group in zip(_names(groups, vary), groups, strict=True):
        numbers = {c: {run.seed: run.numbers[c] for run in group if c in run.numbers} for c in wanted}
        cells = {column: summarise(list(some.values())) for column, some in numbers.items() if some}
        first = first or numbers
        less = {column: difference(first[column], numbers[column]) for column in cells if rows and first[column]}
        rows.append(Row(name, group, cells, less))
    for run in runs:
        if absent := [column for column in wanted if column not in run.numbers]:
            notes.append(f"{run.label} has no {', '.join(absent)}")
    return Comparison(wanted, rows, _floors(runs, wanted, notes), notes + _noise_notes(runs, wanted))


def _one_kind_of_weights(runs: Sequence[MeasuredRun], notes: list[str]) -> list[MeasuredRun]:
    """Of each run the numbers of its first average, or of the raw weights where it has none."""
    kept: dict[Path, MeasuredRun] = {}
    for run in runs:
        if run.path not in kept or kept[run.path].weights == "raw":
            kept[run.path] = run
    for run in runs:
        if run is not kept[run.path]:
            notes.append(f"{run.label}: numbers of the {run.weights} weights are left out; vary=[weights] shows them")
    return list(kept.values())


def _only(run: MeasuredRun, wanted: Sequence[str]) -> MeasuredRun:
    return replace(run, numbers={name: run.numbers[name] for name in wanted if name in run.numbers})


def _groups(runs: Sequence[MeasuredRun], vary: Sequence[str], notes: list[str]) -> list[list[MeasuredRun]]:
    """Runs that differ in their training seed alone, together; a seed that is there twice is no second seed."""
    groups: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        who = identity(run, vary) if run.config else [str(run.path), run.weights]
        groups.setdefault(json.dumps(who, sort_keys=True), []).append(run)
    found: list[list[MeasuredRun]] = []
    for group in groups.values():
        if len({run.seed for run in group}) == len(group):
            found.append(group)
        else:
            found += [[run] for run in group]
            notes.append(f"one config and seed more than once, a row each: {', '.join(run.label for run in group)}")
    return found


def _names(groups: Sequence[Sequence[MeasuredRun]], vary: Sequence[str]) -> list[str]:
    """A name for each row, numbered where the configs do not tell rows apart."""
    runs = [run for group in groups for run in group]
    by_hand = {override.lstrip("+~").partition("=")[0] for run in runs for override in run.overrides}
    told = iter(row_names([identity(group[0], vary) for group in groups if group[0].config], by_hand, vary))
    names: list[str] = []
    for run, *_ in groups:
        dated = Path(run.label).stem if run.path.is_file() else run.label
        names.append((next(told) if run.config else "") or re.sub(r"^[\d-]+_[\d-]+_", "", dated))
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _floors(runs: Sequence[MeasuredRun], columns: Sequence[str], notes: list[str]) -> dict[str, float]:
    """The value of real test images in each column, where the runs agree on it to rounding."""
    floors: dict[str, float] = {}
    for column in columns:
        said = [floor for run in runs if column in run.numbers and (floor := run.numbers[column].floor) is not None]
        if said and all(math.isclose(floor, said[0], rel_tol=1e-4) for floor in said):
            floors[column] = said[0]
        elif said:
            notes.append(f"{column}: the runs do not agree on the value of real test images")
    return floors


def _noise_notes(runs: Sequence[MeasuredRun], columns: Sequence[str]) -> list[str]:
    """Whether some runs were measured on other noise than others; said once."""
    for column in columns:
        seeds = {run.label: run.numbers[column].protocol.get(SEED) for run in runs if column in run.numbers}
        if len(set(seeds.values())) > 1:
            told = ", ".join(f"{seed} in {label}" for label, seed in seeds.items())
            return [f"sampling seeds differ, and such samples are not paired: {told}"]
    return []


# --- statistics ---


def t_interval(values: Sequence[float]) -> Interval:
    """Of 95 %, for the mean of at least two independent values."""
    interval = mean_interval(torch.tensor(values, dtype=torch.float64))
    assert interval is not None
    return interval


def summarise(numbers: Sequence[Number]) -> Cell:
    """One run's number with its own interval, or the mean over training seeds with theirs."""
    if len(numbers) == 1:
        return Cell(numbers[0].value, numbers[0].interval, 1)
    values = [number.value for number in numbers]
    return Cell(fmean(values), t_interval(values), len(values))


def difference(first: Mapping[int | None, Number], other: Mapping[int | None, Number]) -> Difference:
    """The other row less the first, paired if it can be.

    Args:
        first: the number of each training seed, at least one.
        other: likewise.
    """
    shared = [seed for seed in first if seed in other]
    if len(shared) >= 2:
        values = [other[seed].value - first[seed].value for seed in shared]
        return Difference(fmean(values), t_interval(values), SEEDS)
    a, b = summarise(list(first.values())), summarise(list(other.values()))
    value = b.value - a.value
    if a.n == b.n == 1:
        one, two = next(iter(first.values())), next(iter(other.values()))
        if _same_draw(one, two) and one.jackknife and two.jackknife:
            left_out = [d - c for c, d in zip(one.jackknife, two.jackknife, strict=True)]
            return Difference(value, jackknife_interval(value, left_out), BLOCKS)
    # An interval over seeds and one over samples know different things: no sum of the two would be right.
    if a.interval is not None and b.interval is not None and (a.n == 1) == (b.n == 1):
        low = math.hypot(b.value - b.interval[0], a.interval[1] - a.value)
        high = math.hypot(b.interval[1] - b.value, a.value - a.interval[0])
        return Difference(value, (value - low, value + high), UNPAIRED)
    return Difference(value, None, BARE)


def _same_draw(one: Number, two: Number) -> bool:
    """Whether sample i of both was drawn from the same noise for the same class."""
    keys = (SEED, "count", "class_balance", "reference_hash")
    a, b = ([number.protocol.get(key) for key in keys] for number in (one, two))
    known = a[0] is not None and a[2] != "as given"
    blocks = len(one.jackknife or []), len(two.jackknife or [])
    return known and a == b and blocks[0] == blocks[1] >= 2
