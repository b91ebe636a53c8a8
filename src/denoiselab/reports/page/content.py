"""Everything that a page shows, as plain data: gathered from run folders, without secrets, under a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from denoiselab.evaluation.records import RUN_FIELDS, Number, protocol_id
from denoiselab.reports.console import protocol_lines
from denoiselab.reports.frontier import higher_is_better
from denoiselab.reports.frontier_pages import TABLE, read_records
from denoiselab.reports.measured_runs import flatten
from denoiselab.reports.page.columns import loss_columns, loss_kinds, number_columns, plain, telling
from denoiselab.reports.page.curves import Curve, Packer, clock, read_curves, thinned
from denoiselab.reports.page.folders import FolderRun, Sweep, read_run, read_sweep
from denoiselab.reports.page.pictures import embedded, find_pictures, within_budget
from denoiselab.runs.secrets import redact

BESIDE = ("_low", "_high", "_real")  # ends of names: what stands beside a number, and is no curve of its own


@dataclass(frozen=True)
class Limits:
    """What a page may hold.

    Args:
        points: of a curve.
        picture_bytes: of all sample grids.
        curves: patterns of the names that are drawn; None: all.
    """

    points: int
    picture_bytes: float
    curves: list[str] | None = None


def gather(folders: Sequence[Path], limits: Limits) -> dict[str, Any]:
    """The data of a page over some runs.

    Args:
        folders: of runs, or of jobs of sweeps, at least one.
        limits: of the page.
    """
    runs = [read_run(folder) for folder in folders]
    notes = [note for run in runs for note in run.notes]
    curves: list[dict[str, Curve]] = []
    for run in runs:
        try:
            found = read_curves(run.path)
        except ValueError as error:
            found = {}
            notes.append(f"{error}; left out")
        curves.append({name: curve for name, curve in found.items() if not _beside(name, found)})
    sweeps = {run.path.resolve().parent: None for run in runs}
    told = [sweep for folder in sweeps if (sweep := read_sweep(folder))]
    chosen, left_out = within_budget([find_pictures(run.path) for run in runs], limits.picture_bytes)
    page = redact(_described(runs, curves, told[0] if len(told) == 1 == len(sweeps) else None))
    packer = Packer()
    drawn = [{name: curve for name, curve in some.items() if _wanted(name, limits.curves)} for some in curves]
    long = sum(len(curve.steps) > limits.points for some in drawn for curve in some.values())
    if long:
        notes.append(
            f"{long:,} of {sum(map(len, drawn)):,} curves are thinned, max_points={limits.points}: of each stretch the least "
            "and the largest value are kept, and it is these that are smoothed"
        )
    for entry, some, wanted, pictures in zip(page["runs"], curves, drawn, chosen, strict=True):
        timed = clock(some)
        entry["curves"] = {name: packer.pack(thinned(curve, limits.points)) for name, curve in wanted.items()}
        entry["clock"] = packer.pack(thinned(timed, limits.points)) if timed else None
        entry["pictures"] = {kind: kept for kind, series in pictures.items() if (kept := embedded(series))}
    return page | {"steps": packer.steps, "notes": redact([*notes, *left_out])}


def _described(runs: Sequence[FolderRun], curves: Sequence[Mapping[str, Curve]], sweep: Sweep | None) -> dict[str, Any]:
    """All that is text or a single number."""
    varying, names = telling(runs)
    measured, numbers = number_columns(runs)
    # A curve of a measured number says nothing of its protocol: its column is that of the number
    more = [sweep.metric] if sweep and not sweep.metric.startswith("metrics") else []
    columns = [*measured, *loss_columns(runs, curves, more)]
    common, own = apart([_leaves(run) for run in runs])
    protocols, records = _protocols(numbers)
    kinds = {name for some in curves for name in some if name.startswith(("train/loss", "val/"))}
    unlike = {name: said for name in kinds if (said := loss_kinds(name, runs, [name in some for some in curves])[1])}
    return {
        "title": sweep.name if sweep else names[0] if len(runs) == 1 else f"{len(runs)} runs",
        "made": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "sweep": {"metric": _column_of(sweep.metric, [c.name for c in columns]), "mode": sweep.mode} if sweep else None,
        "varying": varying,
        "columns": [column.described() for column in columns],
        "unlike": unlike | {_curve_of(column.name): column.unlike for column in measured if column.unlike},
        "runs": [
            {
                "name": name,
                "number": run.number,
                "folder": str(run.path),
                "state": run.state,
                "cause": run.cause,
                "log": run.log,
                "facts": run.facts | _facts(run, some),
                "overrides": run.measured[0].overrides,
                "config": leaves,
                "frontiers": _frontiers(run.path),
            }
            for name, run, leaves, some in zip(names, runs, own, curves, strict=True)
        ],
        "common": common,
        "protocols": protocols,
        "records": records,
    }


def apart(leaves: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all have in common, and what each has of its own; together they give back each.

    Args:
        leaves: by dotted names, of each run.
    """
    told = [{key: json.dumps(value, sort_keys=True) for key, value in some.items()} for some in leaves]
    common = {key: value for key, value in leaves[0].items() if all(some.get(key) == told[0][key] for some in told)}
    return common, [{key: value for key, value in some.items() if key not in common} for some in leaves]


def _leaves(run: FolderRun) -> dict[str, Any]:
    """The config as it was resolved, and the packages that it ran with."""
    leaves = {key: plain(value) for key, value in flatten(run.config).items()}
    return leaves | {f"versions.{key}": plain(value) for key, value in run.versions.items()}


def _wanted(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch(name, pattern) for pattern in patterns)


def _beside(name: str, names: Mapping[str, Any]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in names for end in BESIDE)


def _column_of(metric: str, names: Sequence[str]) -> str:
    """The column that shows what a sweep is judged by, under whatever name it was given."""
    return next((name for name in (metric, metric.removeprefix("metrics/")) if name in names), "")


def _curve_of(column: str) -> str:
    """What training calls the curve of a number; of raw weights it is another one."""
    name, _, weights = column.removesuffix(")").partition(" (")
    return f"metrics_{weights}/{name}" if weights else f"metrics/{name}"


def _facts(run: FolderRun, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """What curves know better: how far a run has come, for how long it has trained, and where its loss was no number."""
    facts: dict[str, Any] = {}
    last = max((int(curve.steps[-1]) for curve in curves.values()), default=None)
    told = run.facts.get("steps")
    if last is not None and (not isinstance(told, int) or (run.state == "running" and last > told)):
        facts["steps"] = last  # what is told is of the attempt before
    if timed := clock(curves):
        facts["seconds"] = float(timed.values[-1])  # of all starts
    loss = curves.get("train/loss")
    if loss is not None and not np.isfinite(loss.values).all():
        facts["not_finite"] = int(loss.steps[np.argmin(np.isfinite(loss.values))])
    return facts


def _protocols(numbers: Mapping[str, Sequence[Number | None]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Each distinct protocol once, in words and in full; and by column, of each run its record without it."""
    protocols: dict[str, Any] = {}
    records: dict[str, list[Any]] = {}
    for title, some in numbers.items():
        records[title] = []
        for number in some:
            if number is None:
                records[title].append(None)
                continue
            name = protocol_id(number.protocol)
            shared = {key: _finite(value) for key, value in number.protocol.items() if key not in RUN_FIELDS}
            own = {key: _finite(value) for key, value in number.protocol.items() if key in RUN_FIELDS}
            try:
                line = next(iter(protocol_lines([Number(number.name, number.value, None, shared)])), "")
            except (AttributeError, TypeError, ValueError):  # of a node that is no mapping
                line = ""
            protocols.setdefault(name, {"line": line, "record": shared})
            number_of = {"value": _finite(number.value), "floor": _finite(number.floor), "own": own, "protocol": name}
            records[title].append(number_of | {"interval": _finite(number.interval)})
    return protocols, records


def _finite(value: Any) -> Any:
    """Plain data that JSON can hold: what is no number becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _frontiers(folder: Path) -> list[dict[str, Any]]:
    """The finished frontiers of a run."""
    found = []
    for file in sorted((folder / "frontier").glob(f"*/{TABLE}")):
        try:
            points = _finite(read_records(file))
        except (OSError, ValueError):
            continue
        if points:
            metric = points[0]["metric"]
            found.append({"name": file.parent.name, "metric": metric, "high": _is_high(metric), "points": points})
    return found


def _is_high(metric: str) -> bool:
    try:
        return higher_is_better(metric)
    except ValueError:
        return False
