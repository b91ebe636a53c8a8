"""A progress bar for people, and plain lines where nobody watches."""

from __future__ import annotations

import logging

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from denoiselab.training.monitor import TrainingMonitor

log = logging.getLogger("denoiselab")


class ProgressBar(Callback):
    """Steps, loss and images/s: a bar on a terminal, otherwise a line each time the monitor logs; lines in the log too."""

    def __init__(self) -> None:
        self.console = Console()
        self._bar: Progress | None = None
        self._shown: dict[str, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar."""
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step, state="")
        self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        """Move the bar."""
        monitor = next((c for c in trainer.callbacks if isinstance(c, TrainingMonitor)), None)  # type: ignore[attr-defined]
        if not trainer.is_global_zero or monitor is None:
            return
        latest = monitor.latest
        state = ""
        if latest:
            state = f"loss {latest['train/loss']:.4f}  {latest['train/images_per_second']:,.0f} images/s"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, state=state)
        if latest and latest is not self._shown:
            line = f"step {trainer.global_step}/{trainer.max_steps}  {state}"
            log.info(line)
            if not self._bar:
                self.console.print(line, highlight=False)
        self._shown = latest

    def on_train_end(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._stop()

    def on_exception(self, *_: object) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
