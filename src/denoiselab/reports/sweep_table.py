"""A sweep as a table: what varies, how each job stands, its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import read_json
from denoiselab.runs.folder import SUMMARY
from denoiselab.runs.sweep_folder import Job, Status, Sweep

STYLES = {"finished": "green", "failed": "bold red", "running": "cyan", "queued": "dim"}  # others: yellow


def varying(job: Job) -> dict[str, str]:
    """What tells a job from the others, by key."""
    parts = (override.partition("=") for override in job.varies)
    return {key.lstrip("+~"): value for key, _, value in parts}


def short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, if no other one ends so."""
    last = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in keys) > 1 else last


def rows(sweep: Sweep, jobs: Sequence[tuple[Job, Status]]) -> list[dict[str, Any]]:
    """A row for each job, by column."""
    table = []
    for job, status in jobs:
        try:
            summary = read_json(job.folder / SUMMARY)
        except (FileNotFoundError, ConfigError):
            summary = {}
        numbers = {**(summary.get("losses") or {}), **(summary.get("metrics") or {})}
        row = {"job": job.number, "folder": job.folder.name, **varying(job)}
        row |= {"state": status.state, "attempts": status.attempts, "steps": status.step, "seconds": status.seconds}
        table.append(row | numbers | {"wandb_id": status.wandb_id, "error": status.error})
    return table


def print_sweep(console: Console, sweep: Sweep, jobs: Sequence[tuple[Job, Status]]) -> None:
    """The table of a sweep, and below it the first cause and the log of each job that failed or was stopped."""
    keys = list(dict.fromkeys(key for job, _ in jobs for key in varying(job)))
    metric = next((status.metric["name"] for _, status in jobs if status.metric), None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("job", justify="right")
    for key in keys:
        table.add_column(escape(short(key, keys)))
    table.add_column("state", no_wrap=True)
    for title in ("tries", "steps", "seconds", metric or "metric"):
        table.add_column(escape(title), justify="right", no_wrap=True)
    for job, status in jobs:
        style = STYLES.get(status.state, "yellow")
        number = status.metric
        shown = f"{number['value']:.5g}" if number and number["name"] == metric else "–"
        cells = [escape(varying(job).get(key, "")) for key in keys]
        cells += [f"[{style}]{status.state}[/]", str(status.attempts), _count(status.step), _count(status.seconds)]
        table.add_row(str(job.number), *cells, shown)
    if not console.is_terminal:  # a file has room
        console.width = max(
            console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum
        )
    console.print(table)
    for job, status in jobs:
        if status.state in ("failed", "preempted", "interrupted"):
            cause = escape(f"job {job.number} {status.state}" + (f": {status.error}" if status.error else ""))
            style = STYLES.get(status.state, "yellow")
            console.print(f"[{style}]{cause}[/]", soft_wrap=True, highlight=False)
            console.print(escape(f"  log: {job.folder / status.log}"), soft_wrap=True, highlight=False, style="dim")


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
