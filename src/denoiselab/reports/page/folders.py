"""What the folder of a run says of it, for a page: how it stands, what it was told, what it has measured.

A folder may be somebody else's, torn by a crash or half written: whatever is not what it should be is as if it were not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from denoiselab.reports.measured_runs import METRICS, MeasuredRun, commanded, flatten, read_all, read_mapping
from denoiselab.runs.files import read_small
from denoiselab.runs.folder import COMMAND, CONFIG, ID, SUMMARY, VERSIONS
from denoiselab.runs.sweep_folder import JOB, STATUS, SWEEP
from denoiselab.runs.sweep_folder import LOG as JOB_LOG

LOG = "train.log"
STATES = ("running", "finished", "failed", "preempted", "interrupted", "stopped", "pruned", "queued", "unknown")
INCIDENTS = "incidents"  # a file for each step that was not finite
LONGEST = 2000  # characters of a value of a config, or of a cause


@dataclass(frozen=True)
class Sweep:
    """What a sweep is after.

    Args:
        name: of the sweep.
        metric: that it is judged by; "" if there is none.
        mode: "min" or "max".
    """

    name: str
    metric: str
    mode: str


@dataclass(frozen=True)
class FolderRun:
    """One run or one job of a sweep.

    Args:
        path: of its folder, as it was given.
        number: of the job in its sweep; None outside of one.
        name: of the job in its sweep, or of the folder without its date.
        state: one of `STATES`.
        cause: why it failed or stopped, the first line; "" if it did not.
        log: the file that says more.
        facts: steps, seconds, attempts, W&B id, incidents and the like, as far as they are known.
        measured: its newest numbers, those of averaged weights first; never empty, but maybe without numbers.
        versions: packages and git commit, by dotted names.
        notes: a line for each thing that could not be read.
    """

    path: Path
    number: int | None
    name: str
    state: str
    cause: str
    log: str
    facts: dict[str, int | float | str]
    measured: list[MeasuredRun]
    versions: dict[str, Any]
    notes: list[str]

    @property
    def config(self) -> dict[str, Any]:
        """Resolved; of a job that never began, as it would have been."""
        return self.measured[0].config

    @property
    def typed(self) -> dict[str, str]:
        """The overrides of the command line by key."""
        pairs = (override.lstrip("+~").partition("=") for override in self.measured[0].overrides)
        return {key: value for key, _, value in pairs}


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep that a folder is of; None if it is of none."""
    told = read_mapping(folder / SWEEP)
    if not told:
        return None
    metric = _mapping(told.get("metric"))
    mode = "max" if metric.get("mode") == "max" else "min"
    return Sweep(_text(told.get("name")) or folder.resolve().name, _text(metric.get("name")), mode)


def read_run(folder: Path) -> FolderRun:
    """Everything about a run but its curves and pictures.

    Args:
        folder: of a run or of a job.
    """
    job, status, summary = (read_mapping(folder / name) for name in (JOB, STATUS, SUMMARY))
    measured, notes = _measured(folder, job)
    facts: dict[str, int | float | str] = {
        "steps": _number(status.get("step")) if status else _number(summary.get("steps")),
        "seconds": _number(status.get("seconds"), _number(summary.get("seconds"))),
        "attempts": _number(status.get("attempts")),
        "wandb": _text(status.get("wandb_id")) or _id(folder),
        "incidents": sum(1 for _ in (folder / INCIDENTS).glob("*")) if (folder / INCIDENTS).is_dir() else 0,
        "exit_code": _number(status.get("exit_code")),
        "written": _last_written(folder),
    }
    own = read_mapping(folder / VERSIONS)
    versions = {key: _mapping(own.get(key)) for key in ("packages", "git")} | {"python": _text(own.get("python"))}
    state = _text(status.get("state")) or _text(summary.get("status"))
    number = job.get("number")
    return FolderRun(
        path=folder,
        number=number if type(number) is int else None,
        name=_text(job.get("name")) or measured[0].label,
        state=state if state in STATES else "unknown",
        cause=_text(status.get("error")) or _text(summary.get("error")),
        log=_log(folder, _text(status.get("log"))),
        facts={key: value for key, value in facts.items() if value not in (None, "")},
        measured=measured,
        versions={k: v for k, v in flatten(versions).items() if v not in ("", "not installed") and k != "git.branch"},
        notes=notes,
    )


def _measured(folder: Path, job: Mapping[str, Any]) -> tuple[list[MeasuredRun], list[str]]:
    """The numbers of a run by their weights, averages first; the job's word where the run has not begun."""
    found, notes = read_all([folder]) if (folder / METRICS).exists() else ([], [])
    told = [note for note in notes if "holds no numbers" not in note]  # it may be training still
    if not found:
        config = read_mapping(folder / CONFIG) or _mapping(job.get("config"))
        how = commanded(job or read_mapping(folder / COMMAND))
        found = [MeasuredRun(folder, folder.resolve().name, "", {}, config, *how)]
    return sorted(found, key=lambda run: run.weights == "raw"), told


def _log(folder: Path, said: str) -> str:
    """The log that a failed run's reader wants: what its status names, else what is there."""
    if said:
        return said
    return next((str(folder / name) for name in (LOG, JOB_LOG) if (folder / name).exists()), "")


def _last_written(folder: Path) -> str:
    """When the run was last heard of; of a process that was killed the summary says "running" for ever."""
    times = []
    for name in ("trace.csv", "metrics.csv", LOG):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return f"{datetime.fromtimestamp(max(times)):%Y-%m-%d %H:%M:%S}" if times else ""


def _id(folder: Path) -> str:
    try:
        return _text(read_small(folder / ID, 1000).decode(errors="replace").strip())
    except (OSError, ValueError):
        return ""


def _text(value: Any) -> str:
    """The first line of a text, at a length that can be read; "" for what is none."""
    lines = value.strip().splitlines() if isinstance(value, str) else []
    return lines[0][:LONGEST] if lines else ""


def _number(value: Any, otherwise: Any = None) -> Any:
    fits = (type(value) is int and abs(value) < 1 << 53) or (isinstance(value, float) and math.isfinite(value))
    return value if fits else otherwise


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
