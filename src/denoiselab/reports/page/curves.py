"""Curves of metrics.csv: read, thinned where they are long, and packed so that a browser unpacks them at once."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoiselab.evaluation.records import LONGEST_NAME
from denoiselab.training.history import METRICS, SECONDS, read_rows

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Curve:
    """A metric by step, steps ascending.

    Args:
        steps: optimizer steps, float64.
        values: as many, float64; some may not be finite.
    """

    steps: Values
    values: Values


def read_curves(folder: Path) -> dict[str, Curve]:
    """The columns of a run's metrics.csv by name, as far as they hold numbers.

    Args:
        folder: of the run.

    Raises:
        ConfigError: if the file cannot be read.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    wanted: dict[str, bool] = {}
    for row in sorted(read_rows(folder / METRICS), key=lambda row: int(row["step"])):
        step = float(row["step"])
        for name, text in row.items():
            if text == "" or name == "step":
                continue
            if name not in wanted:
                wanted[name] = len(name) <= LONGEST_NAME and name.isprintable()
            if wanted[name]:
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(text))
    return {name: Curve(np.array(steps), np.array(values)) for name, (steps, values) in sorted(found.items())}


def thinned(curve: Curve, limit: int) -> Curve:
    """At most about `limit` points: the ends, the least and the largest value of each stretch, and where it breaks off.

    Args:
        curve: any.
        limit: points, at least 4.
    """
    count = len(curve.steps)
    if count <= limit:
        return curve
    kept = {0, count - 1}
    for part in np.array_split(np.arange(count), (limit - 2) // 2):
        values = curve.values[part]
        finite = np.isfinite(values)
        if not finite.all():
            kept.add(int(part[np.argmin(finite)]))
        if finite.any():
            kept.add(int(part[np.argmin(np.where(finite, values, np.inf))]))
            kept.add(int(part[np.argmax(np.where(finite, values, -np.inf))]))
    chosen = np.array(sorted(kept))
    return Curve(curve.steps[chosen], curve.values[chosen])


def clock(curves: Mapping[str, Curve]) -> Curve | None:
    """Seconds of training by step, over all starts of a run, from its beginning; None where that is not known.

    A run that goes on from another one's weights begins at their step: as long before its first row as the next one is after.
    """
    seconds = curves.get(SECONDS)
    if seconds is None or not (good := np.isfinite(seconds.values)).any():
        return None
    steps, values = seconds.steps[good], seconds.values[good]
    begun = max(0.0, steps[0] - (steps[1] - steps[0])) if len(steps) > 1 else 0.0
    return Curve(np.array([begun, *steps]), np.array([0.0, *values]))


class Packer:
    """Turns curves into text; runs of one length log at the same steps, which are kept once."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._known: dict[str, int] = {}

    def pack(self, curve: Curve) -> list[int | str]:
        """The number of the steps, and the values as base64 of little-endian float32: seven digits of each."""
        steps = _base64(curve.steps, "<f8")
        if steps not in self._known:
            self._known[steps] = len(self.steps)
            self.steps.append(steps)
        return [self._known[steps], _base64(curve.values, "<f4")]


def _base64(values: Values, kind: str) -> str:
    with np.errstate(over="ignore", invalid="ignore"):
        return base64.b64encode(values.astype(kind).tobytes()).decode()
