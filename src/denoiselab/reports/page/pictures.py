"""Sample grids of runs, embedded in a page under a budget."""

from __future__ import annotations

import base64
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from denoiselab.runs.files import read_small
from denoiselab.training.history import SAMPLES

PNG = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 1 << 25  # of one picture
NAME = re.compile(r"step_([0-9]{1,15})_([A-Za-z0-9_.=-]{1,60})\.png")
Series = list["Picture"]  # of one kind, by step


@dataclass(frozen=True)
class Picture:
    """A file in a run's samples/.

    Args:
        path: of the file.
        step: of training.
        bytes: in the page, where it is text.
    """

    path: Path
    step: int
    bytes: int


def find_pictures(folder: Path) -> dict[str, Series]:
    """The sample grids of a run by kind, averaged weights before `raw` before other pictures, each by step.

    Args:
        folder: of the run.
    """
    found: dict[str, Series] = {}
    for path in (folder / SAMPLES).glob("step_*.png"):
        name = NAME.fullmatch(path.name)
        if name and path.is_file() and 0 < (size := path.stat().st_size) <= MOST_BYTES:
            found.setdefault(name[2], []).append(Picture(path, int(name[1]), 4 * -(-size // 3)))
    return {
        kind: sorted(found[kind], key=lambda picture: picture.step)
        for kind in sorted(found, key=lambda kind: ("_" in kind, kind == "raw", kind))
    }


def evenly(series: Sequence[Picture], count: int) -> Series:
    """`count` pictures of a series, evenly spread, the last one always and the first one if there are two."""
    if count >= len(series):
        return list(series)
    if count <= 1:
        return list(series[len(series) - count :])
    return [series[round(i * (len(series) - 1) / (count - 1))] for i in range(count)]


def within_budget(runs: Sequence[Mapping[str, Series]], budget: float) -> tuple[list[dict[str, Series]], list[str]]:
    """As many steps of each series as fit, as many for every run; and a line on what is left out.

    Where not even the last picture of each series fits, those of averaged weights go first, run by run.

    Args:
        runs: what `find_pictures` found in each.
        budget: bytes in the page, of all pictures together.
    """
    everything = _size(series for run in runs for series in run.values())
    total = sum(len(series) for run in runs for series in run.values())

    def choose(count: int) -> list[dict[str, Series]]:
        return [{kind: evenly(series, count) for kind, series in run.items()} for run in runs]

    def fits(count: int) -> bool:
        return _size(series for run in choose(count) for series in run.values()) <= budget

    longest = max((len(series) for run in runs for series in run.values()), default=0)
    count = bisect_left(range(1, longest + 1), True, key=lambda count: not fits(count))
    if count > 0 or not total:
        chosen = choose(count)
        left = total - sum(len(series) for run in chosen for series in run.values())
        said = (
            f"{left:,} of {total:,} sample grids are left out, evenly over the steps: all would take {_mb(everything)}"
        )
        return chosen, [f"{said}, max_megabytes={budget / 1e6:g}"] if left else []
    kept: list[dict[str, Series]] = [{} for _ in runs]
    used = number = 0
    for rank in range(max((len(run) for run in runs), default=0)):
        for run, own in zip(runs, kept, strict=True):
            if rank < len(run) and used + (last := list(run.values())[rank][-1]).bytes <= budget:
                own[list(run)[rank]] = [last]
                used, number = used + last.bytes, number + 1
    said = (
        f"only {number:,} of {total:,} sample grids fit, the last ones of some runs: all would take {_mb(everything)}"
    )
    return kept, [f"{said}, max_megabytes={budget / 1e6:g}"]


def embedded(series: Sequence[Picture]) -> list[list[int | str]]:
    """Step and base64 of each picture that is a PNG file."""
    found: list[list[int | str]] = []
    for picture in series:
        try:
            content = read_small(picture.path, MOST_BYTES)
        except (OSError, ValueError):
            continue
        if content.startswith(PNG):
            found.append([picture.step, base64.b64encode(content).decode()])
    return found


def _size(some: Iterable[Sequence[Picture]]) -> int:
    return sum(picture.bytes for series in some for picture in series)


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
