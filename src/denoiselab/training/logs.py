"""Writing metrics: one row to every logger, at the number of finished optimizer steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from denoiselab.runs.folder import git_state, run_id
from denoiselab.training.checkpoint_io import write_atomically
from denoiselab.training.history import surviving


def log_metrics(trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
    """Log one row from rank 0."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with surviving(_files(logger)):
            logger.log_metrics(metrics, step=trainer.global_step)


def log_protocols(trainer: lightning.Trainer, protocols: dict[str, dict[str, Any]]) -> None:
    """Put the protocols of metrics, by the metrics' names, into the config of the W&B run, from rank 0."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, WandbLogger):
            config = logger.experiment.config
            known = dict(config.get("protocols") or {})  # an update replaces the whole entry
            with surviving(_files(logger)):
                config.update({"protocols": known | protocols}, allow_val_change=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file, complete or not at all; a disk that does not take it does not end the run."""
    with surviving(path):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: picture.save(file, format="png"))


def log_image(trainer: lightning.Trainer, key: str, picture: Image.Image) -> None:
    """Log one picture from rank 0 to the loggers that show pictures."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with surviving(_files(logger)):
            if isinstance(logger, WandbLogger):
                logger.log_image(key, [picture], step=trainer.global_step)
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
) -> list[Logger]:
    """One W&B run per training job, its files in the run folder.

    Args:
        run_dir: the run folder, which keeps the id of the W&B run: a resumed run goes on with it.
        name: shown in the dashboard.
        project: W&B project.
        entity: W&B team or user.
        mode: "online", "offline" or "disabled"; None is online when logged in and offline otherwise. WANDB_MODE in the
            environment wins.
        tags: shown in the dashboard.
        notes: shown in the dashboard.
    """
    if int(os.environ.get("RANK", 0)) != 0:  # Lightning's own idea of the rank is set later, by the strategy
        return [WandbLogger(save_dir=run_dir)]  # never asked for a run on other ranks
    run = start_wandb(
        run_dir,
        run_id(run_dir),
        "train",
        name=name,
        project=project,
        entity=entity,
        mode=mode,
        tags=tags,
        notes=notes,
        resume="allow",
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return [WandbLogger(experiment=run, save_dir=run_dir)]


def start_wandb(folder: Path, id: str, job_type: str, *, mode: str | None = None, **how: Any) -> Any:  # noqa: A002
    """A W&B run that says nothing on the terminal and loses a second of rows at most.

    Args:
        folder: where its files go.
        id: of the W&B run.
        job_type: "train", "frontier", …
        mode: as in `wandb_logger`.
        how: further arguments of `wandb.init`.
    """
    import wandb

    chosen: Any = os.environ.get("WANDB_MODE") or mode or ("online" if wandb.login(prompt=False) else "offline")
    settings = wandb.Settings(
        x_transaction_log_flush_interval=1.0,  # default 15 s: the rows that a killed job would lose
        console="off",
        silent=True,
        disable_git=True,  # no remote, whose URL may hold a token, and no diff; the commit is enough
        git_commit=(git_state(Path(__file__).parent) or {}).get("commit"),
        save_code=False,  # whatever the account says
    )
    return wandb.init(dir=folder, id=id, job_type=job_type, mode=chosen, settings=settings, **how)


def finish(trainer: lightning.Trainer, summary: dict[str, Any], status: str) -> None:
    """Write the closing summary and end the W&B run with its true status.

    W&B shows "finished" for exit code 0, "killed" for 255, "preempted" for another one after `mark_preempting`, else "failed".
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            run = logger.experiment
            run.summary.update(summary | {"status": status})
            if status == "preempted":
                run.mark_preempting()
            run.finish(exit_code={"finished": 0, "interrupted": 255}.get(status, 1))
