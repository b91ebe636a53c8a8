"""Folders of sweeps with invented jobs, as they lie on the disk: curves, pictures, numbers, and jobs that failed or wait."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stand_in_runs import number, write_run

CURVES = ("train/loss", "train/images_per_second", "train/seconds", "val/x0_mse")


def write_sweep(
    folder: Path, count: int, *, points: int = 20, pictures: int = 0, columns: int = 4, **sweep: Any
) -> Path:
    """A sweep of `count` finished jobs over objective, learning rate and seed.

    Args:
        folder: of the sweep.
        count: of its jobs.
        points: of each curve.
        pictures: steps at which each run has drawn, with raw and averaged weights.
        columns: curves of each run.
        sweep: further keys of sweep.json.
    """
    folder.mkdir(parents=True)
    names = []
    for i in range(count):
        choice = {"objective": ("v", "epsilon", "x0")[i % 3], "optimizer.lr": (1e-4, 3e-4, 1e-3, 3e-3)[i // 3 % 4]}
        overrides = [f"{key}={value}" for key, value in choice.items()] + [f"seed={i // 12}"]
        names.append(f"{i}_{','.join(overrides)}")
        write_job(folder / names[-1], i, overrides, lr=choice["optimizer.lr"], points=points, columns=columns)
        write_pictures(folder / names[-1], [points * 10 * (k + 1) // pictures for k in range(pictures)], seed=i)
    told = {
        "name": folder.name,
        "time": "2026-01-01T00:00:00",
        "command": ["train.py", "-m"],
        "jobs": names,
        "metric": None,
    }
    (folder / "sweep.json").write_text(json.dumps(told | sweep))
    return folder


def write_job(folder: Path, i: int, overrides: list[str], *, lr: float, points: int = 20, columns: int = 4) -> Path:
    """A finished job with curves that fall, faster with a larger learning rate."""
    values = dict(override.split("=", 1) for override in overrides)
    value = 0.1 + 0.001 / lr / 10 + 0.01 * (i % 7)
    write_run(
        folder,
        number("fd_digits_2k", value, interval=(value - 0.02, value + 0.02), protocol={"step": points * 10}),
        number("accuracy_2k", 1 - value / 10, protocol={"step": points * 10}),
        seed=int(values.get("seed", 0)),
        objective=values.get("objective", "v"),
        overrides=overrides,
        optimizer={"lr": lr},
    )
    write_curves(folder, curves(points, columns, seed=i, floor=value))
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "steps": points * 10, "seconds": 12.5}))
    (folder / "id").write_text(f"id-{i}\n")
    write_status(folder, i, overrides, state="finished", step=points * 10, seconds=12.5, metric=value)
    return folder


def write_status(
    folder: Path, i: int, overrides: list[str], *, config: dict[str, Any] | None = None, **status: Any
) -> Path:
    """job.json and status.json: of a job that never began, all there is."""
    folder.mkdir(parents=True, exist_ok=True)
    objective = dict(override.split("=", 1) for override in overrides).get("objective", "v")
    told = {"number": i, "name": ",".join(overrides), "overrides": overrides, "choices": {"objective": objective}}
    (folder / "job.json").write_text(json.dumps(told | {"config": config or {}}))
    blank = dict.fromkeys(("seconds", "exit_code", "error", "log", "checkpoint", "step", "metric", "wandb_id"))
    (folder / "status.json").write_text(json.dumps(blank | {"attempts": 1} | status))
    return folder


def curves(points: int, columns: int, seed: int, floor: float) -> dict[str, np.ndarray]:
    """Values by name, at the steps 10, 20, …"""
    noise = np.random.default_rng(seed)
    names = [*CURVES, *(f"train/loss_by_log_snr/{k}" for k in range(columns - len(CURVES)))]
    fall = np.exp(-np.arange(points) / (points / 6))
    found = {name: fall + floor + 0.02 * noise.standard_normal(points) for name in names}
    speed = 640 + 10 * noise.standard_normal(points)
    return found | {"train/images_per_second": speed, "train/seconds": np.arange(1, points + 1.0)}


def write_curves(folder: Path, values: dict[str, Any], every: int = 10) -> None:
    """metrics.csv with a row each `every` steps."""
    rows = [",".join(["step", *values])]
    for k in range(len(next(iter(values.values())))):
        rows.append(",".join([str((k + 1) * every), *(repr(float(some[k])) for some in values.values())]))
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def write_pictures(
    folder: Path, steps: list[int], seed: int = 0, kinds: tuple[str, ...] = ("ema", "raw"), side: int = 32
) -> None:
    """Sample grids that are noise."""
    noise = np.random.default_rng(seed)
    for step in steps:
        for kind in kinds:
            (folder / "samples").mkdir(exist_ok=True)
            picture = png(noise.integers(0, 256, (side, side), dtype=np.uint8))
            (folder / "samples" / f"step_{step:07d}_{kind}.png").write_bytes(picture)


def png(pixels: np.ndarray) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()
