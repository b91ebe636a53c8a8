"""Sample grids while a model trains."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback

from denoiselab.evaluation.generate import balanced_labels, generate
from denoiselab.evaluation.pictures import image_grid
from denoiselab.training.history import SAMPLES
from denoiselab.training.logs import log_image, save_picture
from denoiselab.training.module import DiffusionModule


class SampleGrid(Callback):
    """Draws the same noise with the raw and the averaged weights, every `every` optimizer steps and at the end.

    Writes samples/step_0000400_ema.png and so on (a column per class, at most 20; square without
    classes), and shows the same pictures in the dashboard.

    Args:
        every: optimizer steps between grids, at least 1.
        rows: rows of the grid, at least 1.
        seed: of the noise.
    """

    def __init__(self, *, every: int, rows: int, seed: int = 0) -> None:
        for key, value in (("every", every), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{key}={value}: must be at least 1")
        self.every, self.rows, self.seed = every, rows, seed

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        """Draw when a multiple of `every` has just been reached."""
        if trainer.global_step > 0 and trainer.global_step % self.every == 0:
            self._draw(trainer, pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw first if the run was stopped between the checkpoint of a step and the grid of the same step."""
        step = trainer.global_step
        if step > 0 and step % self.every == 0 and step < trainer.max_steps:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the end of the run."""
        if trainer.global_step >= trainer.max_steps:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, DiffusionModule)
        folder = Path(trainer.default_root_dir) / SAMPLES
        names = {name: folder / f"step_{trainer.global_step:07d}_{name}.png" for name in module.ema.names}
        if not trainer.is_global_zero or all(path.exists() for path in names.values()):
            return
        columns = min(module.num_classes, 20) or self.rows
        count = columns * self.rows
        for weights, path in names.items():
            with module.denoiser(weights) as denoiser:
                images = generate(
                    denoiser,
                    module.sampler,
                    indices=range(count),
                    labels=balanced_labels(count, module.num_classes, range(columns) if module.num_classes else None),
                    shape=module.shape,
                    codec=module.codec,
                    seed=self.seed,
                    batch_size=count,
                    device=module.device,
                )
            picture = image_grid(images, columns)
            save_picture(picture, path)
            log_image(trainer, f"samples/{weights}", picture)
