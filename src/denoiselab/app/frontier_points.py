"""The points of a frontier: measured one by one, each kept as a line of points.jsonl as soon as it is finished."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from denoiselab.app.frontier_costs import timed, typical
from denoiselab.app.trained import Trained
from denoiselab.condition import NULL_LABEL
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.noise import hash64
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.counting import Counting
from denoiselab.evaluation.generate import Source, balanced_labels, drawing
from denoiselab.evaluation.metrics import MIN_COUNT
from denoiselab.evaluation.records import Number, count_name, sampling_protocol
from denoiselab.reports.frontier import Point, Skipped, higher_is_better, rungs, survivors
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import from_json, open_own, read_small

POINTS = "points.jsonl"
NOT_OF_A_NUMBER = ("counts", "every", "every_counts", "weights", "bits_per_dim")  # in the config of the metrics
Line = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way of sampling: what a point measures.

    Args:
        name: of the sampler.
        scale: of the guidance.
        budget: what was asked for, in words.
        nodes: of sampler and guidance.
        nfe: what a sample costs; None if the solver chooses.
        sampler: built.
        denoiser: guided.
    """

    name: str
    scale: float
    budget: str
    nodes: dict[str, Any]
    nfe: int | None
    sampler: Sampler
    denoiser: Denoiser

    @cached_property
    def key(self) -> str:
        """Eight hex digits over what is done."""
        return key_of(self.nodes)

    def __str__(self) -> str:
        """For the terminal."""
        return f"{self.name}, scale {self.scale:g}, {self.budget if self.nfe is None else f'{self.nfe} NFE'}"


def key_of(value: Any) -> str:
    """Eight hex digits over plain data."""
    return f"{hash64(json.dumps(value, sort_keys=True, default=str)):016x}"[:8]


def shared_by_all(trained: Trained, batch_size: int) -> dict[str, Any]:
    """What the numbers of all points depend on, as JSON would give it back."""
    metrics, data = trained.parts.metrics, trained.parts.data
    shared = {
        "weights": trained.weights,
        "weights_sha256": trained.weights_sha256,
        "step": trained.step,
        "seed": metrics.seed,
        "metrics": {k: v for k, v in trained.config["metrics"].items() if k not in NOT_OF_A_NUMBER},
        "extractors": {name: extractor.hash for name, extractor in metrics.extractors.items()},
        "training_images": data.fingerprint("train"),
        "test_images": data.fingerprint("test"),
        "objective": trained.config["objective"],
        "codec": trained.config["codec"],
        "batch_size": batch_size,
    }
    return json.loads(json.dumps(shared, default=str))


def device_name(device: torch.device) -> str:
    """What seconds are measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        about = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        about = []
    names = [line.partition(":")[2].strip() for line in about if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_lines(folder: Path) -> list[Line]:
    """The whole lines of points.jsonl; one that an interruption has torn is as if it were not there."""
    file, lines = folder / POINTS, []
    content = read_small(file) if file.is_file() else b""
    for text in content[: _whole(content)].splitlines():
        try:
            line = from_json(text)
            line["numbers"] = [Number.from_dict(number) for number in line["numbers"]]
            whole = {"key", "count", "nfe", "seconds", "shared"} <= set(line) and isinstance(line["shared"], dict)
            if whole and isinstance(line["key"], str) and isinstance(line["count"], int):
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return lines


def _whole(content: bytes) -> int:
    """The length of the lines that end."""
    return content.rfind(b"\n") + 1


def check_shared(lines: Sequence[Line], shared: Mapping[str, Any]) -> None:
    """See to it that new points may stand beside those.

    Raises:
        ValueError: otherwise, naming the first difference.
    """
    for line in lines:
        for key in shared:
            there, here = line["shared"].get(key), shared[key]
            if there != here:
                there, here = (text if len(text := json.dumps(value)) < 60 else "another" for value in (there, here))
                raise ValueError(f"its points have {key}={there}, new ones would have {here}")


class Bench:
    """Measures points of one run, and keeps them.

    Args:
        trained: the run.
        folder: where points.jsonl is.
        shared: what all points have in common.
        lines: points that are measured already.
        count: samples a point.
        metric: name of the number that counts; None: the first Fréchet distance, extrapolated if that is there.
    """

    def __init__(
        self,
        trained: Trained,
        folder: Path,
        shared: dict[str, Any],
        lines: Sequence[Line],
        *,
        count: int,
        metric: str | None,
    ) -> None:
        self.trained, self.folder, self.shared, self.count = trained, folder, shared, count
        self.metric = metric and metric.removesuffix(f"_{count_name(count)}")
        self.lines = {(line["key"], line["count"]): line for line in lines}
        self.warm = False
        for extractor in trained.parts.metrics.extractors.values():
            extractor.to(trained.device)

    def first(self, ways: Sequence[Way]) -> Line:
        """A point with all samples, or else the cheapest one, not kept yet: to see whether its numbers will do.

        Raises:
            ConfigError: if the number that counts is not among them.
        """
        known = next((line for line in self.lines.values() if line["count"] == self.count), None)
        line = known or self._measure(min(ways, key=_cost), self.count, None)
        if not self._preferred(line):
            names = ", ".join(_by_base(line))
            raise ConfigError(
                f"metric={self.metric or 'null'}: must be one of the numbers that metrics measures: {names}"
            )
        return line

    def keep(self, line: Line) -> None:
        """Append a line that is new, and have it on disk before going on."""
        if (line["key"], line["count"]) in self.lines:
            return
        self.lines[line["key"], line["count"]] = line
        file = self.folder / POINTS
        if file.is_file():
            os.truncate(file, _whole(file.read_bytes()))
        with open_own(file, "a") as stream:
            plain = line | {"numbers": [number.to_dict() for number in line["numbers"]]}
            stream.write(json.dumps(plain) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def measure(self, ways: Sequence[Way], *, halving: bool) -> tuple[str, list[Point], list[Skipped]]:
        """The name of the number that counts; the points in the order of the ways; the ways that failed, with the reason."""
        alive, points, failed, base = sorted(ways, key=_cost), dict[str, Point](), list[Skipped](), None
        for count in rungs(self.count, MIN_COUNT) if halving else [self.count]:
            lines: dict[str, Line] = {}
            for i, way in enumerate(alive, 1):
                if (way.key, count) not in self.lines:
                    print(f"n={count}, {i} of {len(alive)}: {way}", file=sys.stderr)
                try:
                    lines[way.key] = self._line(way, count)
                except RuntimeError as error:  # such as: the solver wants more steps than it may take
                    if way.nfe is not None:
                        raise
                    failed.append(Skipped(way.name, way.scale, way.budget, str(error)))
            alive = [way for way in alive if way.key in lines]
            base = self._base(lines.values())
            if base is None:  # too few samples for this number: none is left behind yet
                continue
            found = {way.key: _point(way, lines[way.key], base) for way in alive if base in _by_base(lines[way.key])}
            kept = list(found.values())
            if count < self.count:
                kept = survivors(kept, higher=higher_is_better(base))
            for way in alive:
                point = found.get(way.key)
                if point is None:
                    failed.append(Skipped(way.name, way.scale, way.budget, f"{base}: cannot be had of {count} samples"))
                elif point in kept:
                    points[way.key] = point
                else:
                    points[way.key] = replace(point, pruned=True)
                    shutil.rmtree(self._shards(way), ignore_errors=True)
            alive = [way for way in alive if found.get(way.key) in kept]
        assert base is not None
        ends = {key: point for key, point in points.items() if point.pruned or point.count == self.count}
        return f"{base}_{count_name(self.count)}", [ends[way.key] for way in ways if way.key in ends], failed

    def _line(self, way: Way, count: int) -> Line:
        if (way.key, count) not in self.lines:
            self.keep(self._measure(way, count, self._shards(way)))
        if count == self.count:
            shutil.rmtree(self._shards(way), ignore_errors=True)
        return self.lines[way.key, count]

    def _shards(self, way: Way) -> Path:
        """Where the features of a point that is not finished are kept."""
        return self.folder / f".features_{way.key}_{key_of(self.shared)}"

    def _source(self, denoiser: Denoiser, way: Way) -> Source:
        parts = self.trained.parts
        return drawing(
            denoiser,
            way.sampler,
            labels=balanced_labels(self.count, parts.data.num_classes),
            shape=parts.shape,
            codec=parts.codec,
            seed=parts.metrics.seed,
            batch_size=self.shared["batch_size"],
            device=self.trained.device,
        )

    def _measure(self, way: Way, count: int, shards: Path | None) -> Line:
        metrics, data = self.trained.parts.metrics, self.trained.parts.data
        counting = Counting(way.denoiser) if way.nfe is None else None
        if not self.warm:  # the first call of a network is slower than the others
            list(self._source(way.denoiser, way)(range(min(MIN_COUNT, count))))
            self.warm = True
        spent: list[tuple[int, float]] = []
        source = timed(self._source(counting or way.denoiser, way), spent)
        labels = balanced_labels(count, data.num_classes)
        asked = torch.full((count,), NULL_LABEL) if labels is None else labels
        made = {key: self.shared[key] for key in ("weights", "weights_sha256", "step", "seed")}
        protocol = sampling_protocol(way.nodes, **made, nfe=way.nfe)
        measured = metrics.measure(source, asked, data, protocol, counts=[count], shards=shards)
        if not spent:  # all features were there, from before an interruption; the seconds were not
            list(source(range(min(count, self.shared["batch_size"]))))
        return {
            "key": way.key,
            "sampler": way.name,
            "scale": way.scale,
            "budget": way.budget,
            "count": count,
            "nfe": counting.mean() if counting else way.nfe,
            "seconds": typical(spent),
            "numbers": measured.numbers,
            "shared": self.shared,
        }

    def _preferred(self, line: Line) -> list[str]:
        """Base names of the number that counts, the best one first, as far as the line has them."""
        numbers = _by_base(line)
        if self.metric is not None:
            return [self.metric] if self.metric in numbers else []
        plain = next((base for base in numbers if base.split("_")[0] in ("fid", "fd") and "_inf" not in base), "")
        family, _, label = plain.partition("_")
        wanted = [f"{family}_inf_{label}".rstrip("_"), plain]
        return [base for base in wanted if base in numbers]

    def _base(self, lines: Iterable[Line]) -> str | None:
        """The number that counts, such that every line that has one has it."""
        preferred = [names for line in lines if (names := self._preferred(line))]
        return next((base for names in preferred for base in names if all(base in other for other in preferred)), None)


def _cost(way: Way) -> float:
    return math.inf if way.nfe is None else way.nfe


def _by_base(line: Line) -> dict[str, Number]:
    """The finite numbers of a line, without the count in their names."""
    end = f"_{count_name(line['count'])}"
    return {number.name.removesuffix(end): number for number in line["numbers"] if math.isfinite(number.value)}


def _point(way: Way, line: Line, base: str) -> Point:
    number = _by_base(line)[base]
    return Point(
        sampler=way.name,
        scale=way.scale,
        budget=way.budget,
        nfe=line["nfe"],
        seconds=line["seconds"],
        value=number.value,
        interval=number.interval,
        floor=number.floor,
        jackknife=number.jackknife,
        count=line["count"],
    )
