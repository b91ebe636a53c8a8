"""What a run has written line by line, and how a resumed run goes on with it.

Three files grow while a run trains: metrics.csv (a row for each step at which something was logged), trace.csv (a row for
each step) and metrics.jsonl (a line for each measured number). A run that is killed at step 57 and goes on from its
checkpoint of step 40 makes the rows 41 to 57 again; so they are cut off first, and with them a line that was being written.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from denoiselab.evaluation.records import Number
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import from_json, open_own, read_small, write_text

log = logging.getLogger(__name__)
METRICS, TRACE, NUMBERS, SAMPLES = "metrics.csv", "trace.csv", "metrics.jsonl", "samples"
SECONDS = "train/seconds"  # an x-axis: every row with numbers has it


def rewind(run_dir: Path, step: int) -> None:
    """Leave in the three files, and of the pictures, what belongs to the steps up to this one."""
    pictures = run_dir / SAMPLES
    for picture in () if pictures.is_symlink() else pictures.glob("step_*.png"):
        if (number := re.match(r"step_([0-9]{1,18})_", picture.name)) and int(number[1]) > step:
            picture.unlink()
    for name in (METRICS, TRACE):
        if (run_dir / name).exists():
            rows = read_rows(run_dir / name)
            kept = [row for row in rows if int(row["step"]) <= step]
            write_text(run_dir / name, _table(kept, columns=list(rows[0])) if rows else "")
    if (run_dir / NUMBERS).exists():
        numbers = [line for line in read_numbers(run_dir / NUMBERS) if line["protocol"]["step"] <= step]
        write_text(run_dir / NUMBERS, "".join(f"{json.dumps(line)}\n" for line in numbers))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file: a step, and in each column a number or nothing; none if there is no file.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return [row for row in csv.DictReader(_whole_lines(path)) if _is_whole(row)]
    except csv.Error as error:
        raise ConfigError(f"{path}: is damaged ({error})") from error


def series(run_dir: Path, name: str) -> dict[int, float]:
    """A logged number by step; `fd_digits_500` is metrics/fd_digits_500."""
    rows = read_rows(run_dir / METRICS)
    return {int(row["step"]): float(row[key]) for row in rows for key in (name, f"metrics/{name}") if row.get(key)}


def _is_whole(row: Mapping[Any, Any]) -> bool:
    step = row.get("step")
    if not (isinstance(step, str) and step.isascii() and step.isdecimal() and len(step) < 19):
        return False
    try:  # of a row that is too short or too long, a field is None or a list
        return all(field == "" or isinstance(float(field), float) for field in row.values())
    except (TypeError, ValueError):
        return False


def read_numbers(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, each a `Number` of some step; none if there is no file.

    Raises:
        ConfigError: if it cannot be read.
    """
    found = []
    for line in _whole_lines(path):
        try:
            record = from_json(line)
            if Number.from_dict(record).protocol.get("step") is not None:
                found.append(record)
        except ValueError:  # the machine went down before the disk had it all
            continue
    return found


def _whole_lines(path: Path) -> list[str]:
    try:
        lines = read_small(path).decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [line for line in lines if line.endswith("\n") and "\0" not in line]


def _table(rows: Iterable[Mapping[str, Any]], header: bool = True, columns: list[str] | None = None) -> str:
    rows = list(rows)
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows of equal keys to a CSV file, which gets a header if it is new; see `append_text`."""
    if rows:
        append_text(path, _table(rows, header=not path.exists() or path.stat().st_size == 0))


def append_text(path: Path, text: str) -> None:
    """Add text to a file, which is on the disk when this returns.

    Raises:
        OSError: if the disk does not take it; none of it is there then.
    """
    with open_own(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            data = text.encode()
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def surviving(path: Path) -> Iterator[None]:
    """Inside, a disk that does not take a file of the run costs that file and not the run: the error is logged."""
    try:
        yield
    except OSError as error:
        log.error("%s: could not be written (%s); the run goes on", path, error.strerror or error)


class CSVLogger(Logger):
    """metrics.csv: one row a step, in whatever order its numbers come; complete after each call, and continued by a resume.

    Lightning's own logger deletes the file of a run that is resumed.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / METRICS
        self.rows: dict[int, dict[str, Any]] = {int(row["step"]): dict(row) for row in read_rows(self.path)}
        self.columns = list(next(iter(self.rows.values()), {"step": 0}))
        self._behind = False  # whether the file lacks a row that the disk has refused

    @property
    def name(self) -> str:
        """Part of Lightning's interface."""
        return ""

    @property
    def version(self) -> str:
        """Part of Lightning's interface."""
        return ""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """config.json has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the numbers of a step."""
        assert step is not None
        new = [key for key in metrics if key not in self.columns]
        amended = step in self.rows
        self.rows.setdefault(step, {"step": step}).update(metrics)
        if new or amended:
            self.columns = ["step", *sorted({*self.columns, *new} - {"step"})]
        with surviving(self.path):
            whole, self._behind = new or amended or self._behind, True
            if whole:
                write_text(self.path, _table(self.rows.values(), columns=self.columns))
            else:
                append_text(self.path, _table([self.rows[step]], header=False, columns=self.columns))
            self._behind = False
