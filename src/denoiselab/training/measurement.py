"""Metrics while a model trains and at its end."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback

from denoiselab.data.datamodule import ImageDataModule
from denoiselab.evaluation.generate import draw
from denoiselab.evaluation.metrics import Metrics
from denoiselab.evaluation.records import Number, sampling_protocol
from denoiselab.training.logs import log_metrics
from denoiselab.training.module import DiffusionModule


class Measurement(Callback):
    """Measures samples of the averaged weights every `metrics.every` steps, if that is set, and at the end.

    Logs `metrics/<name>` and writes each number with its protocol as a line of metrics.jsonl.

    Args:
        metrics: what to measure.
        batch_size: samples per network call.
    """

    def __init__(self, *, metrics: Metrics, batch_size: int = 500) -> None:
        self.metrics, self.batch_size = metrics, batch_size
        self.numbers: list[Number] = []
        self._measured = 0

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        """Measure when a multiple of `metrics.every` has just been reached."""
        every = self.metrics.every
        if every is not None and trainer.global_step > 0 and trainer.global_step % every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the end of the run."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, DiffusionModule)
        if trainer.global_step == self._measured or self.metrics.num_samples == 0:
            return
        self._measured = trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        with module.denoiser() as denoiser:
            images, labels = draw(
                denoiser,
                module.sampler,
                count=self.metrics.num_samples,
                num_classes=data.num_classes,
                shape=module.shape,
                codec=module.codec,
                seed=self.metrics.seed,
                batch_size=self.batch_size,
                device=module.device,
            )
            nfe = module.sampler.plan(denoiser)[1]
        if not trainer.is_global_zero:
            return
        if self.metrics.extractor is not None:
            self.metrics.extractor.to(module.device)
        protocol = sampling_protocol(module.config, weights=module.ema.default, seed=self.metrics.seed, nfe=nfe)
        self.numbers = self.metrics.measure(images, labels, data, protocol | {"step": trainer.global_step})
        with (Path(trainer.default_root_dir) / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(number.to_dict()) + "\n" for number in self.numbers)
        row = {f"metrics/{number.name}": number.value for number in self.numbers}
        row |= {f"metrics/{n.name}_real": n.floor for n in self.numbers if n.floor is not None}
        log_metrics(trainer, row)
