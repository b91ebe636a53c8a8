"""`denoiselab-compare`: runs side by side, like with like."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from denoiselab.reports.compare import side_by_side
from denoiselab.reports.compare_pages import as_csv, as_json, as_markdown, print_comparison
from denoiselab.reports.measured_runs import METRICS, UnlikeError, columns_of, read_all
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import prepare_folder
from denoiselab.runs.folder import CONFIG
from denoiselab.runs.named import runs_named

COMPARE_KEYS: dict[str, Any] = {
    "runs": list[str],
    "vary": list[str],
    "columns": list[str] | None,
    "output": str | None,
}
WRITERS = {".md": as_markdown, ".csv": as_csv, ".json": as_json}


def compare(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Print the table, and write it where `output` says; exit code 2 if unlike numbers would share a column.

    Raises:
        ConfigError: if an option is wrong, or there is nothing to compare.
    """
    for key, annotation in COMPARE_KEYS.items():
        check_value(options[key], annotation, key)
    output = None if options["output"] is None else Path(options["output"])
    if output is not None and output.suffix not in WRITERS:
        raise ConfigError(f"output={output}: must be a file that ends in {', '.join(WRITERS)}")
    paths = list(
        dict.fromkeys(path for given in options["runs"] for path in runs_named(given, (CONFIG, METRICS), (CONFIG,)))
    )
    if not paths:
        raise ConfigError("runs=[]: name run folders or evaluation files, as in compare.py run_a run_b")
    runs, notes = read_all(paths)
    if not runs:
        raise ConfigError(f"runs: hold no numbers ({'; '.join(notes)})")
    for note in notes:
        print(f"compare: {note}", file=sys.stderr)
    try:
        found = side_by_side(runs, vary=options["vary"], columns=_columns(options["columns"], columns_of(runs)))
    except UnlikeError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if output is not None:
        try:
            prepare_folder(output.parent)
        except ValueError as error:
            raise ConfigError(f"output={output}: {error}") from error
        output.write_text(WRITERS[output.suffix](found))
    print_comparison(Console(), found)


def _columns(patterns: list[str] | None, columns: list[str]) -> list[str] | None:
    """The columns that are wanted, in the order of the patterns."""
    for pattern in patterns or []:
        if not any(fnmatch(column, pattern) for column in columns):
            raise ConfigError(f"columns={pattern}: must be among {', '.join(columns)}")
    return patterns and list(dict.fromkeys(c for pattern in patterns for c in columns if fnmatch(c, pattern)))
