"""Writing metrics: one row to every logger, at the number of finished optimizer steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from denoiselab.runs.folder import run_id
from denoiselab.training.checkpoint_io import write_atomically
from denoiselab.training.history import surviving
from denoiselab.training.wandb_identity import identify, last_step
from denoiselab.training.wandb_run import RunLogger, begin_run


def log_metrics(trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
    """Log one row from rank 0."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with surviving(_files(logger)):
            logger.log_metrics(metrics, step=trainer.global_step)


def log_protocols(trainer: lightning.Trainer, protocols: dict[str, dict[str, Any]]) -> None:
    """Put the protocols of metrics, by the metrics' names, into the config of the W&B run, from rank 0."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, RunLogger):
            with surviving(_files(logger)):
                logger.add_protocols(protocols)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file, complete or not at all; a disk that does not take it does not end the run."""
    with surviving(path):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: picture.save(file, format="png"))


def log_image(trainer: lightning.Trainer, key: str, picture: Image.Image) -> None:
    """Log one picture from rank 0 to the loggers that show pictures."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with surviving(_files(logger)):
            if isinstance(logger, RunLogger):
                logger.history.add_picture(trainer.global_step, key, picture)
            elif isinstance(logger, TensorBoardLogger):
                import numpy as np

                pixels = np.asarray(picture.convert("RGB"))
                logger.experiment.add_image(key, pixels, trainer.global_step, dataformats="HWC")


def _files(logger: Logger) -> Path:
    """What a logger writes, for messages."""
    return Path(logger.save_dir or "") / type(logger).__name__


def no_logger(*, run_dir: Path, name: str) -> list[Logger]:
    """Nothing beside metrics.csv, which every run writes."""
    return []


def tensorboard_logger(*, run_dir: Path, name: str) -> list[Logger]:
    """TensorBoard event files in the run folder."""
    return [TensorBoardLogger(save_dir=run_dir, name="tensorboard", version="", default_hp_metric=False)]


def wandb_logger(
    *,
    run_dir: Path,
    name: str,
    project: str = "denoiselab",
    entity: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
    tags: list[str] | None = None,
    notes: str | None = None,
    images: int = 64,
    checkpoints: bool = False,
) -> list[Logger]:
    """One W&B run per training job, its files in the run folder.

    Args:
        run_dir: the run folder, which keeps the id, name, group, project and entity of the W&B run: a resumed run goes on
            with it.
        name: shown in the dashboard for a run without a name or overrides of its own.
        project: W&B project.
        entity: W&B team or user.
        mode: "online", "offline" or "disabled"; None is online when logged in and offline otherwise. WANDB_MODE in the
            environment wins.
        tags: shown in the dashboard, beside the choices of data set, backbone and objective.
        notes: shown in the dashboard.
        images: pictures that are sent at most, spread evenly over the run; all of them are in samples/.
        checkpoints: whether the newest and the best checkpoint are uploaded when the run has finished.
    """
    if int(os.environ.get("RANK", 0)) != 0:  # Lightning's own idea of the rank is set later, by the strategy
        return [WandbLogger(save_dir=run_dir)]  # never asked for a run on other ranks
    options: dict[str, Any] = {"project": project, "entity": entity, "notes": notes}
    identity = identify(run_dir, name, tags=tags, images=images, checkpoints=checkpoints, **options)
    return [begin_run(run_dir, run_id(run_dir), identity, mode, last_step(run_dir))]


def finish(trainer: lightning.Trainer, summary: dict[str, Any], status: str) -> None:
    """Write the closing summary and end the W&B run with its true status."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger) and trainer.is_global_zero:
            logger.finish(summary, status)
