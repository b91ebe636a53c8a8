"""The runs that a command line means: folders, folders of runs such as sweeps, patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from denoiselab.runs.errors import ConfigError


def runs_named(given: str, marks: Sequence[str], inside: Sequence[str]) -> list[Path]:
    """The runs and files that are meant by a path, a pattern or the folder of a sweep; the tenth job after the ninth.

    Args:
        given: on the command line.
        marks: files of which a run has one.
        inside: files of which each run in a folder of runs has one.

    Raises:
        ConfigError: if there is nothing of this name.
    """

    def order(folder: Path) -> tuple[list[int], str]:
        return [int(number) for number in re.findall(r"\d{1,18}", folder.name)], folder.name

    paths = [Path(given)] if Path(given).exists() else [Path(path) for path in sorted(glob(given))]
    if not paths:
        raise ConfigError(f"runs={given}: there is no such run folder or file")
    found: list[Path] = []
    for path in paths:
        below = sorted({file.parent for name in inside for file in path.glob(f"*/{name}")}, key=order)
        is_run = path.is_file() or any((path / name).exists() for name in marks)
        found += [path] if is_run or not below else below
    return found
