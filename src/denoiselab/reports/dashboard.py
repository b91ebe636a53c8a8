"""What a dashboard of runs shows, as plain data: sections of panels over the numbers that runs log.

Of a sweep or a folder of runs, the numbers are those that its runs have logged; where none has begun, and for a project
alone, those of the default configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from denoiselab.runs.changes import UNSAID, below
from denoiselab.runs.files import read_json, read_small
from denoiselab.runs.folder import COMMAND, CONFIG, ID
from denoiselab.runs.sweep_folder import JOB, SWEEP
from denoiselab.training.history import METRICS, SECONDS, read_rows
from denoiselab.training.monitor import bin_names
from denoiselab.training.wandb_history import STEP, pictures_of
from denoiselab.training.wandb_identity import TAGGED

LEVELS = (-8, -6, -4, -2, 0, 2, 4, 6, 8)  # of conf/callbacks/default.yaml
TRAINING = ("train/loss", "train/grad_norm", "train/lr", "train/images_per_second", SECONDS)
VALIDATION = ("val/x0_mse", "val/epsilon_mse")
DEFAULTS = (
    *TRAINING,
    *VALIDATION,
    *(f"train/loss_by_log_snr/{name}" for name in bin_names()),
    *(f"{name}/log_snr_{level}" for name in VALIDATION for level in LEVELS),
    "metrics/fd_digits_500",
    "metrics/fd_digits_500_real",
    "samples/ema",
    "samples/raw",
    "samples/ema_closest_to_training",
)
COLUMNS = (*(f"choices.{group}" for group in TAGGED), "choices.sampler", "optimizer.lr", "nfe", "seed")
BETTER = (
    "accuracy",
    "precision",
    "recall",
    "density",
    "coverage",
    "is_",
    "class_",
)  # beginnings: more of these is better

Kind = Literal["lines", "scatter", "pictures", "parallel", "importance", "bars", "differences"]


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        kind: of panel.
        title: above it.
        keys: of the numbers or pictures that it shows.
        x: of lines, a key; of a scatter plot, a key of the config.
        config: keys of the config that it shows, dotted.
        log_x: whether its x-axis is logarithmic.
        log_y: whether its y-axis is logarithmic.
        falling: of a parallel plot, whether less is better.
    """

    kind: Kind
    title: str
    keys: tuple[str, ...] = ()
    x: str = STEP
    config: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False
    falling: bool = True


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    name: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """A dashboard.

    Args:
        title: of it.
        sweep: the name of the sweep's folder; None: it is of no sweep.
        sections: in their order.
        ids: of its runs at W&B, where it is of no sweep; None: all runs of the project.
    """

    title: str
    sweep: str | None
    sections: tuple[Section, ...]
    ids: tuple[str, ...] | None = None

    def keys(self) -> set[str]:
        """All numbers and pictures that it shows, and those that it shows them against."""
        panels = [panel for section in self.sections for panel in section.panels]
        axes = {panel.x for panel in panels if panel.kind == "lines"}
        return axes | {key for panel in panels for key in panel.keys}


def make_board(
    title: str,
    sweep: str | None,
    logged: Iterable[str],
    metric: str,
    columns: Sequence[str],
    *,
    falling: bool,
    ids: Sequence[str] | None = None,
) -> Board:
    """The dashboard of runs.

    Args:
        title: of it.
        sweep: the name of the sweep's folder, if it is of one.
        logged: keys of numbers and pictures that runs log.
        metric: the key of the number that counts most.
        columns: dotted keys of the config in which runs differ.
        falling: whether less of the metric is better.
        ids: of the runs at W&B, if it is of some that are no sweep.
    """
    known = list(dict.fromkeys(logged))
    floor = (f"{metric}_real",) if f"{metric}_real" in known else ()

    def have(*keys: str) -> tuple[str, ...]:
        return tuple(key for key in keys if key in known)

    def below_key(prefix: str) -> tuple[str, ...]:
        return tuple(key for key in known if key.startswith(prefix))

    grids = tuple(key for key in known if re.fullmatch(r"samples/[^/]+", key) and "_closest" not in key)
    closest = tuple(key for key in known if key.startswith("samples/") and "_closest" in key)
    quality = (
        Panel("lines", f"{metric} against steps", (metric, *floor)),
        Panel("lines", f"{metric} against seconds of training", (metric, *floor), x=SECONDS),
        Panel("scatter", f"{metric} against NFE", (metric,), x="nfe", log_x=True),
        Panel("lines", "validation error against steps", have(*VALIDATION), log_y=True),
        Panel("lines", "validation error against seconds of training", have(*VALIDATION), x=SECONDS, log_y=True),
    )
    samples = (
        Panel("pictures", "samples over time", grids),
        Panel("pictures", "samples and their closest training images", closest),
    )
    noise = (
        Panel("lines", "loss by log-SNR", below_key("train/loss_by_log_snr/"), log_y=True),
        *(Panel("lines", f"{key} by log-SNR", below_key(f"{key}/log_snr_"), log_y=True) for key in VALIDATION),
    )
    training = tuple(Panel("lines", key, have(key), log_y=key == "train/loss") for key in TRAINING[:3])
    speed = (
        Panel("lines", "images per second", have("train/images_per_second")),
        Panel("lines", "seconds of training", have(SECONDS)),
    )
    runs = (
        Panel("parallel", f"what makes {metric}", (metric,), config=tuple(columns), falling=falling),
        Panel("importance", f"what matters to {metric}", (metric,)),
        Panel("bars", f"{metric} of each run", (metric,)),
        Panel("differences", "how the configs differ"),
    )
    sections = {"Quality": quality, "Samples": samples, "Noise levels": noise, "Training": training}
    sections |= {"Throughput": speed, "Sweep" if sweep else "Runs": runs}
    shown = {name: tuple(p for p in panels if p.keys or p.kind == "differences") for name, panels in sections.items()}
    made = tuple(Section(name, panels) for name, panels in shown.items() if panels)
    return Board(title, sweep, made, None if ids is None else tuple(ids))


def logged_keys(runs: Sequence[Path]) -> list[str]:
    """The keys of numbers and pictures that some runs have logged; those of the default configuration if none has.

    Raises:
        ConfigError: if a file of them is damaged.
    """
    found: dict[str, None] = {}
    for run in runs:
        for row in read_rows(run / METRICS):
            found |= {key: None for key, value in row.items() if value and key != "step"}
        found |= {key: None for pictures in pictures_of(run).values() for key in pictures}
    return sorted(found, key=_natural) if found else list(DEFAULTS)


def _natural(key: str) -> list[Any]:
    """Sorts noise levels by their number, and what is below one before all others."""
    parts = re.split(r"(-?\d+)", key.replace("below_", "!"))
    return [(1, int(part), "") if re.fullmatch(r"-?\d+", part) else (0, 0, part) for part in parts]


def choose_metric(runs: Sequence[Path], sweep: Path | None, logged: Sequence[str]) -> tuple[str, bool]:
    """The key of the number that counts most, and whether less of it is better.

    That of the sweep, if it has one; else the distance of the most samples that runs have measured; else the
    validation error.
    """
    said = _dict(sweep / SWEEP).get("metric") if sweep is not None else None
    if isinstance(said, dict) and isinstance(said.get("name"), str):
        name = said["name"]
        key = next(
            (key for key in (name, f"metrics/{name}") if key in logged), name if "/" in name else f"metrics/{name}"
        )
        return key, said.get("mode") != "max"
    distances = [key for key in logged if re.fullmatch(r"metrics/(fid|fd_[a-z0-9]+)_\d+", key)]
    if distances:
        return max(distances, key=lambda key: ("/fid_" in key, int(key.rpartition("_")[2]))), True
    return VALIDATION[0], True


def is_falling(metric: str) -> bool:
    """Whether less of a number is better, by its name."""
    return not metric.rpartition("/")[2].startswith(BETTER)


def varying_columns(runs: Sequence[Path]) -> list[str]:
    """The keys of the config in which the commands of runs or jobs differ; choices of groups are below "choices"."""
    told: list[dict[str, str]] = []
    groups: set[str] = set()
    for run in runs:
        command = _dict(run / JOB) or _dict(run / COMMAND)
        choices, overrides = command.get("choices"), command.get("overrides")
        groups |= set(choices) if isinstance(choices, dict) else set()
        pairs = [str(o).lstrip("+~").partition("=") for o in overrides] if isinstance(overrides, list) else []
        told.append({key: value for key, equals, value in pairs if equals})
    keys = dict.fromkeys(key for some in told for key in some if not below(key, (*UNSAID, "logger", "hydra")))
    names = [key for key in keys if len({some.get(key) for some in told}) > 1]
    return [f"choices.{name}" if name in groups else name for name in names] or list(COLUMNS)


def ids_of(runs: Sequence[Path]) -> list[str]:
    """What W&B knows runs by; one that it has not seen has no id yet."""
    return [read_small(run / ID, 1000).decode(errors="replace").strip() for run in runs if (run / ID).exists()]


def where_logged(runs: Sequence[Path]) -> tuple[str | None, str | None]:
    """The W&B project and entity of runs, as their configs say."""
    for run in runs:
        config: Mapping[str, Any] = _dict(run / CONFIG) or _dict(run / JOB).get("config") or {}
        node = config.get("logger") if isinstance(config, dict) else None
        if isinstance(node, dict) and isinstance(node.get("project"), str):
            entity = node.get("entity")
            return node["project"], entity if isinstance(entity, str) else None
    return None, None


def _dict(path: Path) -> dict[str, Any]:
    try:
        said = read_json(path)
    except FileNotFoundError:
        return {}
    return said if isinstance(said, dict) else {}
