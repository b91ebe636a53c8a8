"""The columns of a page's table: what tells runs apart, and numbers, held to one protocol each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from denoiselab.evaluation.records import Number
from denoiselab.reports.frontier import higher_is_better
from denoiselab.reports.measured_runs import (
    UnlikeError,
    brief,
    check_protocols,
    covered,
    flatten,
    identity,
    like,
    shortened,
    telling_keys,
)
from denoiselab.reports.page.curves import Curve
from denoiselab.reports.page.folders import LONGEST, FolderRun

# Of an override: what says where a run lies or who sees it, and not what it is
OF_THE_RUN = ("name", "run", "runs", "resume", "allow", "trust", "logger", "hydra")
LOSSES = ("train/loss", "val/x0_mse", "val/epsilon_mse")
SAMPLING = ("sampler", "guidance")  # nodes of a protocol by which a sweep's numbers may differ and still be compared
# What a loss means: of the training loss, whatever decides its target and weight; of the others, the noise levels; the data
TRAINED_ON, VALIDATED_ON, DATA = ("objective", "codec"), ("callbacks.validation", "codec"), "datamodule"


@dataclass(frozen=True)
class Column:
    """A number of each run.

    Args:
        name: of the number, and of its curve where there is one.
        better: "low", "high" or "" if neither end is good.
        kinds: for each run a letter; runs of unlike letters must not be compared. "" where the run has no such number.
        unlike: what differs between the letters, one line; "" if nothing does.
        values: for each run; None where it has none.
        varied: the overrides by which the protocols differ and that are compared nevertheless, as the runs were told them.
    """

    name: str
    better: str
    kinds: list[str]
    unlike: str
    values: list[float | None]
    varied: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """For the page."""
        values = [value if value is None or math.isfinite(value) else str(value) for value in self.values]
        kinds = self.kinds if self.unlike else None
        said = {"unlike": self.unlike, "varied": list(self.varied)}
        return {"name": self.name, "better": self.better, "kinds": kinds, "values": values} | said


def telling(runs: Sequence[FolderRun]) -> tuple[list[dict[str, Any]], list[str]]:
    """What differs between runs, as columns with a value for each; and a name for each run, made of that.

    Args:
        runs: at least one.
    """
    by_hand = {key for run in runs for key in run.typed if not covered(key, OF_THE_RUN)} | {"seed"}
    rows = [identity(replace(run.measured[0], weights=""), ()) | _values(run, by_hand) for run in runs]
    begun = [row for row, run in zip(rows, runs, strict=True) if run.config]  # of the others little is known
    keys = telling_keys(begun or rows, by_hand) if len(runs) > 1 else []
    short = shortened(keys)
    columns = [{"key": key, "name": short[key], "values": [plain(row.get(key)) for row in rows]} for key in keys]
    names = [", ".join(f"{short[key]}={brief(row[key])}" for key in keys if key in row) for row in rows]
    own = [name or _undated(run.name) for name, run in zip(names, runs, strict=True)]
    return columns, [
        f"{name} ({own[: i + 1].count(name)})" if own.count(name) > 1 else name for i, name in enumerate(own)
    ]


def _values(run: FolderRun, keys: set[str]) -> dict[str, Any]:
    """What a run has under keys that were typed for some run: a choice, a value of its config, or the text itself."""
    measured = run.measured[0]
    leaves = flatten(measured.config)
    known: dict[str, Any] = {**leaves, **measured.choices}
    return {key: known.get(key, run.typed.get(key)) for key in keys if key in known or key in run.typed}


def _undated(name: str) -> str:
    date, _, rest = name.partition("_")
    time, _, rest = rest.partition("_")
    return rest if rest and f"{date}{time}".replace("-", "").isdecimal() else name


def plain(value: Any) -> Any:
    """A value of a config as the page shows it: numbers and truths as they are, text at a length that can be read."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 1 << 53 else f"{value:g}" if isinstance(value, float) else brief(value)
    return brief(value) if isinstance(value, str) and len(value) <= 100 else str(value)[:LONGEST]


def number_columns(runs: Sequence[FolderRun]) -> tuple[list[Column], dict[str, list[Number | None]]]:
    """A column for each measured number, raw weights beside averages as columns of their own; and the numbers in it."""
    found: dict[str, list[Number | None]] = {}
    for i, run in enumerate(runs):
        for j, measured in enumerate(run.measured):
            for name, number in measured.numbers.items():
                title = f"{name} ({measured.weights})" if j else name
                found.setdefault(title, [None] * len(runs))[i] = number
    swept = _swept(runs)
    return [_column(title, numbers, runs, swept) for title, numbers in found.items()], found


def _swept(runs: Sequence[FolderRun]) -> list[str]:
    """The overrides in which runs differ on purpose, of how their samples are made."""
    keys = dict.fromkeys(key for run in runs for key in run.typed)
    dotted = {key: key.replace("/", ".") for key in keys if len({run.typed.get(key) for run in runs}) > 1}
    return [name for name in dotted.values() if covered(name, SAMPLING)]


def _column(title: str, numbers: Sequence[Number | None], runs: Sequence[FolderRun], swept: Sequence[str]) -> Column:
    have = [(run, number) for run, number in zip(runs, numbers, strict=True) if number is not None]
    leaves = [flatten(number.protocol) for _, number in have]
    differing = {key for some in leaves for key in some if len({other.get(key) for other in leaves}) > 1}
    vary = [name for name in swept if any(covered(key, [name]) for key in differing)]
    kinds = _letters([None if n is None else json.dumps(like(n.protocol, vary), sort_keys=True) for n in numbers])
    unlike = ""
    try:
        check_protocols([replace(run.measured[0], numbers={title: number}) for run, number in have], vary)
    except UnlikeError as error:
        unlike = str(error).partition("; compare like")[0]
    values = [None if n is None else n.value for n in numbers]
    return Column(title, better(title), kinds, unlike, values, tuple(vary))


def better(name: str) -> str:
    """Which end of a number is the good one: "low", "high" or ""."""
    if "loss" in name or "mse" in name:
        return "low"
    try:
        return "high" if higher_is_better(name) else "low"
    except ValueError:
        return ""


def loss_columns(runs: Sequence[FolderRun], curves: Sequence[Mapping[str, Curve]], more: Sequence[str]) -> list[Column]:
    """A column for the last value of each loss; losses of unlike objectives or data are not comparable either.

    Args:
        runs: of the page.
        curves: of each.
        more: further curves whose last value is wanted.
    """
    columns: list[Column] = []
    for name in dict.fromkeys([*LOSSES, *more]):
        values = [float(some[name].values[-1]) if name in some else None for some in curves]
        if any(value is not None for value in values):
            columns.append(Column(name, better(name), *loss_kinds(name, runs, [v is not None for v in values]), values))
    return columns


def loss_kinds(name: str, runs: Sequence[FolderRun], there: Sequence[bool]) -> tuple[list[str], str]:
    """For each run a letter, and what differs between the letters.

    Args:
        name: of a curve.
        runs: of the page.
        there: whether the run has that curve.
    """
    nodes = TRAINED_ON if name.startswith("train/loss") else VALIDATED_ON if name.startswith("val/") else ()
    leaves = [
        {key: value for key, value in flatten(run.config).items() if covered(key, nodes) or (nodes and key == DATA)}
        for run in runs
    ]
    kinds = _letters(
        [json.dumps(some, sort_keys=True) if own else None for some, own in zip(leaves, there, strict=True)]
    )
    if len({kind for kind in kinds if kind}) < 2:
        return kinds, ""
    shown = [some for some, own in zip(leaves, there, strict=True) if own]
    differing = [
        key for key in dict.fromkeys(k for some in shown for k in some) if len({s.get(key) for s in shown}) > 1
    ]
    said = ", ".join(dict.fromkeys(brief(some[differing[0]]) if differing[0] in some else "not said" for some in shown))
    return kinds, f"{name}: means something else where {differing[0]} differs: {said}"


def _letters(kinds: Sequence[str | None]) -> list[str]:
    """a, b, c … for each kind in the order in which they come; "" for none."""
    order = list(dict.fromkeys(kind for kind in kinds if kind is not None))
    return ["" if kind is None else _letter(order.index(kind)) for kind in kinds]


def _letter(number: int) -> str:
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
