"""Where a run stands in a sweep, read from the folders: a sweep's folder holds those of its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import read_json

SWEEP, JOB = "sweep.json", "job.json"


def membership(run_dir: Path) -> tuple[str, str] | None:
    """The name of the sweep that a run is a job of, and the job's own, such as "objective=v,seed=1"; None for a single run."""
    sweep, job = _name(run_dir.parent / SWEEP), _name(run_dir / JOB)
    return None if sweep is None or job is None else (sweep, job)


def _name(path: Path) -> str | None:
    """The name in a file; None if there is none, or it says nothing that can be read: a run goes on without it."""
    try:
        said: Any = read_json(path)
    except (FileNotFoundError, NotADirectoryError, ConfigError):
        return None
    name = said.get("name") if isinstance(said, dict) else None
    return name if isinstance(name, str) and name else None
