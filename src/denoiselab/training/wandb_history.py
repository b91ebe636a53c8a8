"""The history of a W&B run: each number arrives once, and their steps never go back, however often the run is resumed.

W&B appends rows; what has arrived cannot be taken back. So a row of a step is held until the next one begins, and is sent
whole (then all its numbers can be each other's x-axis too); and a run that is resumed is asked how far W&B has come, by the
last `trainer/global_step` in its summary. What lies before is not sent again: a resumed run makes the steps after its
checkpoint a second time, with the same numbers. What is missing, since the machine went down or there was no network,
is sent from metrics.csv and samples/ first. W&B's own `_step` only counts the rows.

Of pictures there is a budget. A picture is sent once it is as far from the last one as the steps that are left divided by
the pictures that are left, and one is kept for the end: evenly spread over the run, and all of them if there are few.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import read_json, read_small, write_json
from denoiselab.training.history import METRICS, SAMPLES, SECONDS, read_rows
from denoiselab.training.wandb_identity import WANDB

log = logging.getLogger(__name__)
STEP = "trainer/global_step"  # the x-axis: finished optimizer steps
SENT = "sent.json"
MOST_PICTURE_BYTES = 1 << 26
_PICTURE = re.compile(r"step_([0-9]{1,18})_([A-Za-z0-9_.-]{1,80})\.png")


@dataclass(frozen=True)
class Sent:
    """What W&B has of a run.

    Args:
        step: of the last row; −1 if there is none.
        keys: of the numbers and pictures of that step; None: all that there are.
        pictures: how many were sent, by step.
    """

    step: int = -1
    keys: frozenset[str] | None = frozenset()
    pictures: Mapping[int, int] = field(default_factory=dict)

    def has(self, step: int, key: str) -> bool:
        """Whether W&B has a number or a picture."""
        return step < self.step or (step == self.step and (self.keys is None or key in self.keys))

    def plus(self, step: int, keys: frozenset[str], pictures: int) -> Sent:
        """With one row more."""
        both = keys if step > self.step or self.keys is None else keys | self.keys
        shown = {step: self.pictures.get(step, 0) + pictures} if pictures else {}
        return Sent(step, both, {**self.pictures, **shown})

    def at(self, step: int) -> Sent:
        """What W&B has if it says that this step is the last that it has: what was on its way may not have arrived."""
        keys = self.keys if step == self.step else None
        return Sent(step, keys, {s: count for s, count in self.pictures.items() if s <= step})


def read_sent(run_dir: Path) -> Sent:
    """What was noted last; nothing, if nothing was or it cannot be read."""
    try:
        said = read_json(run_dir / WANDB / SENT)
        pictures = {int(step): int(count) for step, count in said["pictures"].items()}
        return Sent(int(said["step"]), frozenset(map(str, said["keys"])), pictures)
    except (FileNotFoundError, ConfigError, TypeError, ValueError, KeyError, AttributeError):
        return Sent()


def write_sent(run_dir: Path, sent: Sent, **more: Any) -> None:
    """Note what was sent, and more beside it."""
    (run_dir / WANDB).mkdir(exist_ok=True)
    note = {
        "step": sent.step,
        "keys": sorted(sent.keys or ()),
        "pictures": {str(s): c for s, c in sent.pictures.items()},
    }
    write_json(run_dir / WANDB / SENT, note | more)


def affordable(step: int, count: int, sent: Mapping[int, int], *, budget: int, end: int | None) -> int:
    """How many of the pictures of a step are sent.

    Args:
        step: that they show.
        count: how many there are, at least 1.
        sent: how many were sent, by step.
        budget: of all pictures of the run.
        end: the run's last step, for whose pictures room is kept; None: unknown.
    """
    left, last = max(0, budget - sum(sent.values())), max(sent, default=0)
    if end is None or step >= end:
        return min(count, left)
    times = left // count  # that as many can be sent, once of them at the end
    return count if times > 1 and (step - last) * times >= end - last else 0


class History:
    """Sends a run's rows to W&B, a step a row, each number once; but the seconds of training, an x-axis, with each row.

    Args:
        run: of W&B.
        sent: what it has already.
        images: budget of pictures.
        end: the run's last step; None: unknown.
        note: the run folder, to note in it what was sent; None: nowhere.
        sparing: note pictures alone as they are sent, for whoever notes the rest at the end.
    """

    def __init__(
        self,
        run: Any,
        *,
        sent: Sent | None = None,
        images: int = 64,
        end: int | None = None,
        note: Path | None = None,
        sparing: bool = False,
    ) -> None:
        self.run, self.sent, self.images, self.end = run, sent or Sent(), images, end
        self.note, self.sparing = note, sparing
        self.rows = self.shown = 0  # sent by this object
        self._step, self._numbers, self._pictures = -1, dict[str, float](), dict[str, Image.Image]()

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, which may be the last one's."""
        self._begin(step)
        self._numbers |= numbers

    def add_picture(self, step: int, key: str, picture: Image.Image) -> None:
        """A picture of a step, which may be the last one's."""
        self._begin(step)
        self._pictures[key] = picture

    def _begin(self, step: int) -> None:
        if step != self._step:
            self.flush()
            self._step = step

    def flush(self) -> None:
        """Send the row that is held."""
        import wandb

        row: dict[str, Any] = {k: v for k, v in self._numbers.items() if not self.sent.has(self._step, k)}
        axis = {k: v for k, v in self._numbers.items() if k == SECONDS}
        new = [(k, p) for k, p in self._pictures.items() if not self.sent.has(self._step, k)]
        self._numbers, self._pictures = {}, {}
        if new:
            new = new[: affordable(self._step, len(new), self.sent.pictures, budget=self.images, end=self.end)]
        row |= {key: [wandb.Image(picture)] for key, picture in new}
        if not row:
            return
        self.run.log({**row, **axis, STEP: self._step})
        self.sent = self.sent.plus(self._step, frozenset(row), len(new))
        self.rows, self.shown = self.rows + 1, self.shown + len(new)
        if self.note is not None and (new or not self.sparing):
            write_sent(self.note, self.sent)

    def catch_up(self, run_dir: Path, last: int | None = None) -> None:
        """Add what the run folder has and W&B has not; the newest row is held.

        Args:
            run_dir: the run folder.
            last: the last step that is added; None: all.
        """
        rows = {int(row["step"]): row for row in read_rows(run_dir / METRICS)}
        drawn = pictures_of(run_dir)
        for step in sorted({*rows, *drawn}):
            if step < self.sent.step or (last is not None and step > last):
                continue
            numbers = {key: float(value) for key, value in rows.get(step, {}).items() if value and key != "step"}
            self.add(step, numbers)
            for key, path in drawn.get(step, {}).items():
                if not self.sent.has(step, key) and (picture := _opened(path)) is not None:
                    self.add_picture(step, key, picture)


def pictures_of(run_dir: Path) -> dict[int, dict[str, Path]]:
    """The pictures in a run folder: step → name in the dashboard → file."""
    found: dict[int, dict[str, Path]] = {}
    for path in _files(run_dir / SAMPLES):
        if name := _PICTURE.fullmatch(path.name):
            key = re.sub("_closest$", "_closest_to_training", f"{SAMPLES}/{name[2]}")
            found.setdefault(int(name[1]), {})[key] = path
    return found


def _files(folder: Path) -> Iterator[Path]:
    yield from () if folder.is_symlink() or not folder.is_dir() else sorted(folder.glob("step_*.png"))


def _opened(path: Path) -> Image.Image | None:
    """A picture; None, with a word in the log, if it is damaged."""
    try:
        picture = Image.open(io.BytesIO(read_small(path, MOST_PICTURE_BYTES)), formats=["PNG"])
        picture.load()
        return picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        log.warning("%s: is no picture that can be sent (%s)", path, error)
        return None
