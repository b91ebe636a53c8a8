"""`denoiselab-report`: one HTML page over runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from denoiselab.reports.page.content import Limits, gather
from denoiselab.reports.page.folders import JOB, SWEEP
from denoiselab.reports.page.write import write_page
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import prepare_folder
from denoiselab.runs.folder import CONFIG
from denoiselab.runs.named import runs_named

REPORT_KEYS: dict[str, Any] = {
    "runs": list[str],
    "output": str,
    "max_megabytes": float,
    "max_points": int,
    "curves": list[str] | None,
}
FEWEST_POINTS = 10
HEAVY = 100_000_000  # bytes: beyond it browsers take long to open a page


def report(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Gather the runs, write the page, and say where it is.

    Raises:
        ConfigError: if an option is wrong, or there is no run.
    """
    for key, annotation in REPORT_KEYS.items():
        check_value(options[key], annotation, key)
    if options["max_megabytes"] < 0:
        raise ConfigError(f"max_megabytes={options['max_megabytes']}: must be at least 0")
    if options["max_points"] < FEWEST_POINTS:
        raise ConfigError(f"max_points={options['max_points']}: must be at least {FEWEST_POINTS}")
    output = Path(options["output"])
    if output.suffix != ".html" or output.is_dir():
        raise ConfigError(f"output={output}: must be a file that ends in .html")
    folders = _folders(options["runs"])
    try:
        prepare_folder(output.parent)
    except ValueError as error:
        raise ConfigError(f"output={output}: {error}") from error
    limits = Limits(options["max_points"], options["max_megabytes"] * 1e6, options["curves"])
    data = gather(folders, limits)
    for note in data["notes"]:
        print(f"report: {note}", file=sys.stderr)
    try:
        size = write_page(data, output)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written ({error.strerror or error})") from error
    if size > HEAVY:
        print("report: the page is large; curves=['train/loss','val/*'] or fewer runs make it lighter", file=sys.stderr)
    runs = "1 run" if len(folders) == 1 else f"{len(folders)} runs"
    print(f"{output}: {runs}, {size / 1e6:.1f} MB; open it in a browser")


def _folders(given: list[str]) -> list[Path]:
    """The folders of all runs and jobs that are meant, each once."""
    if not given:
        raise ConfigError("runs=[]: name run folders or sweeps, as in report.py sweeps/<sweep>")
    marks = (CONFIG, JOB)
    found = list(dict.fromkeys(path for name in given for path in runs_named(name, marks, marks)))
    found = [path for path in found if path.name != SWEEP]  # it lies beside the jobs, and patterns catch it
    for path in found:
        if not any((path / mark).exists() for mark in marks):
            raise ConfigError(f"runs={path}: is no run folder; it has no {CONFIG}")
    return found
