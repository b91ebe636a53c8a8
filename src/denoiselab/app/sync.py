"""`denoiselab-sync`: send runs to W&B that were trained without a network, each number once and in order."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.folder import CONFIG
from denoiselab.runs.sweep_folder import JOB

SYNC_KEYS: dict[str, Any] = {"runs": list[str], "again": bool}


def sync(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Send the runs one after the other, and print what was done.

    Raises:
        ConfigError: if an option is wrong, there is no such run, or nobody is logged in.
        RankError: if one of them could not be sent.
    """
    for key, annotation in SYNC_KEYS.items():
        check_value(options[key], annotation, key)
    runs = list(dict.fromkeys(run for given in options["runs"] for run in folders_of(given)))
    if not runs:
        raise ConfigError("runs=[]: name run folders or sweeps, as in sync.py runs/a sweeps/b")
    os.environ["WANDB_MODE"] = "online"  # whatever the runs themselves were told
    from denoiselab.training.wandb_sync import FAILED, LoggedOutError, send

    console = Console()
    table = Table("run", "", "rows", "pictures", "up to step", "note", box=None, header_style="bold", pad_edge=False)
    outcomes = []
    for run in runs:
        try:
            outcomes.append(outcome := send(run, again=options["again"]))
        except LoggedOutError as error:
            raise ConfigError("sync: not logged in to W&B; say wandb login, or set WANDB_API_KEY") from error
        step = "" if outcome.step is None else f"{outcome.step:,}"
        table.add_row(run.name, outcome.state, f"{outcome.rows:,}", f"{outcome.pictures:,}", step, outcome.note)
    console.print(table)
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    if failed:
        raise RankError(f"{len(failed)} of {len(runs)} runs could not be sent; what has arrived will not be sent again")


def folders_of(given: str) -> list[Path]:
    """The run folders that are meant by a path, a pattern, a sweep or a folder of runs.

    Raises:
        ConfigError: if there is none.
    """
    paths = [Path(given)] if Path(given).exists() else [Path(path) for path in sorted(glob(given))]
    found: list[Path] = []
    for path in paths:
        if (path / CONFIG).exists() or (path / JOB).exists():
            found.append(path.resolve())
        elif path.is_dir():
            found += [
                run.resolve() for run in sorted(path.iterdir()) if (run / CONFIG).exists() or (run / JOB).exists()
            ]
    if not found:
        raise ConfigError(f"runs={given}: there is no run folder, nor a folder of some")
    return found
