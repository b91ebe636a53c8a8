"""Metrics while a model trains and at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from denoiselab.data.datamodule import ImageDataModule
from denoiselab.evaluation.counting import Counting
from denoiselab.evaluation.generate import balanced_labels, drawing
from denoiselab.evaluation.metrics import PAIRS, Measured, Metrics
from denoiselab.evaluation.pictures import image_grid
from denoiselab.evaluation.records import Number, sampling_protocol
from denoiselab.training.checkpoint import digest
from denoiselab.training.history import NUMBERS, SAMPLES, append_text, read_numbers, surviving
from denoiselab.training.logs import log_image, log_metrics, log_protocols, save_picture
from denoiselab.training.module import DiffusionModule
from denoiselab.training.signals import stoppable

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


def _silent(total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


class Measurement(Callback):
    """Measures samples of the averaged weights every `metrics.every` steps, if that is set, and at the end.

    Logs `metrics/<name>` (of other weights than the first average `metrics_<weights>/<name>`), and writes each number with
    its protocol as a line of metrics.jsonl. Samples have noise of their own, so training goes on as if nothing had been.

    Args:
        metrics: what to measure.
        batch_size: samples per network call.
        progress: a context manager of (total, unit) whose value is told how many images were just finished; None shows
            nothing.
    """

    def __init__(self, *, metrics: Metrics, batch_size: int = 500, progress: Progress | None = None) -> None:
        self.metrics, self.batch_size, self.progress = metrics, batch_size, progress or _silent
        self.numbers: list[Number] = []
        self.seconds: dict[str, float] = {}
        self._measured = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure first if the run was stopped between the checkpoint of a step and its measurement."""
        if trainer.global_step > 0 and self._due(trainer):
            self._measure(trainer, pl_module, self.metrics.every_counts)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        """Measure a few samples when a multiple of `metrics.every` has just been reached."""
        if trainer.global_step > self._measured and self._due(trainer):
            self._measure(trainer, pl_module, self.metrics.every_counts)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the end of the run."""
        if trainer.global_step >= trainer.max_steps:
            self._measure(trainer, pl_module, self.metrics.counts)

    def _due(self, trainer: lightning.Trainer) -> bool:
        step, every = trainer.global_step, self.metrics.every
        return every is not None and step % every == 0 and step < trainer.max_steps

    def _measure(self, trainer: lightning.Trainer, module: lightning.LightningModule, counts: Sequence[int]) -> None:
        assert isinstance(module, DiffusionModule)
        if not counts:
            return
        self._measured, self.numbers, self.seconds = trainer.global_step, [], {}
        found = trainer.strategy.broadcast(self._written(trainer, module, max(counts)))
        if found:
            self.numbers = [Number.from_dict(number) for number in found]
            return
        with stoppable(trainer):
            self._measure_all(trainer, module, counts)

    def _measure_all(self, trainer: lightning.Trainer, module: DiffusionModule, counts: Sequence[int]) -> None:
        for extractor in self.metrics.extractors.values():
            extractor.to(module.device)
        for weights in self.metrics.weights or [module.ema.default]:
            measured = self._of(weights, trainer, module, counts)
            self.numbers += measured.numbers
            for name, seconds in measured.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if not trainer.is_global_zero:
                continue
            group = "metrics" if weights == module.ema.default else f"metrics_{weights}"
            row = {f"{group}/{n.name}": n.value for n in measured.numbers}
            row |= {f"{group}/{n.name}_real": n.floor for n in measured.numbers if n.floor is not None}
            for n in measured.numbers:
                if n.interval is not None:
                    row |= {f"{group}/{n.name}_low": n.interval[0], f"{group}/{n.name}_high": n.interval[1]}
            log_metrics(trainer, row | module.clock)
            if measured.images is not None:
                picture = image_grid(measured.images, PAIRS)
                folder = Path(trainer.default_root_dir) / SAMPLES
                save_picture(picture, folder / f"step_{trainer.global_step:07d}_{weights}_closest.png")
                log_image(trainer, f"samples/{weights}_closest_to_training", picture)
            log_protocols(trainer, {f"{group}/{n.name}": n.protocol for n in measured.numbers})
        if trainer.is_global_zero:  # last and at once: what stands there is not measured again
            with surviving(path := Path(trainer.default_root_dir) / NUMBERS):
                append_text(path, "".join(f"{json.dumps(number.to_dict())}\n" for number in self.numbers))

    def _written(self, trainer: lightning.Trainer, module: DiffusionModule, count: int) -> list[dict[str, Any]]:
        """The numbers of this step that an earlier start of the run has written, if it has written them all."""
        lines = read_numbers(Path(trainer.default_root_dir) / NUMBERS)
        here = [line for line in lines if line["protocol"]["step"] == trainer.global_step]
        wanted = {(weights, count) for weights in self.metrics.weights or [module.ema.default]}
        return here if wanted <= {(line["protocol"]["weights"], line["protocol"].get("count")) for line in here} else []

    def _of(self, weights: str, trainer: lightning.Trainer, module: DiffusionModule, counts: Sequence[int]) -> Measured:
        """The numbers of the weights of one name."""
        data, count, seed = trainer.datamodule, max(counts), self.metrics.seed  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        labels = balanced_labels(count, data.num_classes)
        with module.denoiser(weights) as denoiser:
            nfe = module.sampler.plan(denoiser)[1]
            counting = Counting(denoiser) if nfe is None else None
            source = drawing(
                counting or denoiser,
                module.sampler,
                labels=labels,
                shape=module.shape,
                codec=module.codec,
                seed=seed,
                batch_size=self.batch_size,
                device=module.device,
            )
            protocol = sampling_protocol(
                module.config,
                weights=weights,
                weights_sha256=digest(module.network.state_dict()),
                step=trainer.global_step,
                seed=seed,
                nfe=nfe,
            )
            asked = torch.full((count,), -1) if labels is None else labels
            with self.progress(count, "images") as advance:
                return self.metrics.measure(
                    source, asked, data, protocol, counts=counts, advance=advance, counting=counting
                )
