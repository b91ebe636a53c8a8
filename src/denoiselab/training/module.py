"""The one LightningModule: a network trained by an objective, with averages of its weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.objective import Objective
from denoiselab.diffusion.samplers import Sampler
from denoiselab.training.checkpoint import SCHEMA, environment, network_weights
from denoiselab.training.dropout import key_dropout
from denoiselab.training.ema import EMA, RAW
from denoiselab.training.gate import Gate
from denoiselab.training.schedule import Schedule


class Codec(Protocol):
    """Pixels to what the network sees, and back."""

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees of images of this shape."""
        ...

    def encode(self, images: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """uint8 images to what the network sees; codecs that draw do so from `noise`, or take their mean without it."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """What the network draws to uint8 images."""
        ...


class Augmentation(Protocol):
    """Changes training images, and says how in numbers that a network can be told."""

    def __call__(self, images: Tensor, noise: NoiseSource) -> tuple[Tensor, Tensor | None]:
        """What the network sees, augmented, and the labels (B, K); None if nothing is ever changed."""
        ...


class DiffusionModule(lightning.LightningModule):
    """Trains a network on batches of {"image", "label", "place"}.

    Args:
        network: `network(x, t, condition)`; its dropout layers are replaced, see `key_dropout`.
        objective: path, prediction and loss.
        codec: pixels to what the network sees, and back.
        augmentation: of training images; samples never see it.
        sampler: how samples are drawn for pictures and metrics.
        guidance: makes a guided denoiser of a denoiser.
        optimizer: makes an optimizer of parameters.
        schedule: the learning rate over the run.
        ema: averages of the weights.
        seed: of times, noise, dropout and label dropout.
        batch_size: samples per optimizer step over all ranks and accumulation.
        shape: (C, H, W) of what the network sees.
        num_classes: of the data; 0 if it has none.
        config: the resolved config as plain dicts, kept in every checkpoint.
        data: fingerprints of the training and the test data, kept likewise.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        objective: Objective,
        codec: Codec,
        augmentation: Augmentation,
        sampler: Sampler,
        guidance: Callable[[Denoiser], Denoiser],
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        ema: EMA,
        seed: int,
        batch_size: int,
        shape: tuple[int, int, int],
        num_classes: int,
        config: dict[str, Any],
        data: dict[str, str],
    ) -> None:
        super().__init__()
        self.network, self.objective, self.codec = network, objective, codec
        self.augmentation, self.sampler, self.guidance = augmentation, sampler, guidance
        self.make_optimizer, self.schedule, self.ema = optimizer, schedule, ema
        self.seed, self.batch_size, self.config, self.data = seed, batch_size, config, data
        self.shape, self.num_classes = shape, num_classes
        self.places = key_dropout(network, seed)
        self.gate = Gate()
        self.grad_norm = torch.zeros(())
        self.seen: list[Tensor] = []  # place, t and loss of this step's samples, for an objective that observes them
        self.waiting_since = time.perf_counter()  # when the last step ended and the next batch was asked for
        self.clock: dict[str, float] = {}  # seconds of training as `TrainingMonitor` counts them, to go with every row
        self.ema.start(network)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The mean loss of a micro-batch; randomness is a function of (seed, step, place in the global batch)."""
        noise = NoiseSource(self.seed, batch["place"], self.global_step, self.batch_size)
        self.places.set(batch["place"], self.global_step)
        x0, changes = self.augmentation(self.codec.encode(batch["image"], noise), noise)
        loss, t = self.objective(self.network, x0, replace(condition_of(batch), augment=changes), noise)
        if self.objective.observes:
            self.seen.append(torch.stack((batch["place"].to(t.dtype), t, loss.detach().to(t.dtype))))
        return {"loss": self.gate.mark(loss.mean()), "losses": loss.detach(), "t": t}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Validation is the work of callbacks, which know at which noise levels; see `NoiseLevelValidation`."""

    def configure_optimizers(self) -> Any:
        """The optimizer, with the schedule stepped once per optimizer step."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        scheduler = self.schedule(optimizer)
        self.settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """The config has the last word on the optimizer's settings, of which a checkpoint has brought its own."""
        (optimizer,), (scheduled,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        scheduler = scheduled.scheduler
        for group, settings in zip(optimizer.param_groups, self.settings, strict=True):
            rate = settings["initial_lr"] * self.schedule.factor(scheduler.last_epoch)
            group.update({**settings, "lr": rate})
        scheduler.base_lrs = [settings["initial_lr"] for settings in self.settings]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm, keep what it was before, and hold the step back if it is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(
                optimizer
            )  # Lightning leaves it to a fused optimizer's step, which is too late for the norm
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters(), limit).detach()
        self.gate.decide(self.grad_norm, optimizer, scaler)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step (Lightning calls this once per accumulated batch), then the averages and what the objective learns."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.network, self.gate.ok)
        if self.seen:
            gathered = self.all_gather(torch.cat(self.seen, dim=1))
            assert isinstance(gathered, Tensor)  # (ranks, 3, samples); without ranks (3, samples)
            place, t, loss = gathered.movedim(-2, 0).flatten(1)
            order = place.argsort()
            self.objective.observe(t[order], torch.where(self.gate.ok, loss[order], math.nan))
            self.seen = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Callbacks are done (Lightning calls them first): from here on the loop waits for data."""
        self.waiting_since = time.perf_counter()

    @contextmanager
    def denoiser(self, weights: str | None = None, guided: bool = True) -> Iterator[Denoiser]:
        """A denoiser with the weights of that name (None: the first average) in evaluation mode, without gradients."""
        was_training = self.network.training
        try:
            with self.ema.applied(self.network, weights or self.ema.default), torch.no_grad():
                self.network.eval()
                denoiser = self.objective.denoiser(self.network)
                yield self.guidance(denoiser) if guided else denoiser
        finally:
            self.network.train(was_training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averages and the config; raw weights stay raw even if an average is in the network just now."""
        state = checkpoint["state_dict"]
        for key in [k for k in state if k.startswith("network.")]:
            state[key] = self.ema.raw(key.removeprefix("network."), state[key])
        averages = self.ema.state_dict()
        checkpoint.update(schema=SCHEMA, environment=environment(), config=self.config, data=self.data)
        checkpoint.update(ema=averages["averages"], ema_updates=averages["updates"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averages over; one that is new begins with the weights."""
        raw = network_weights(checkpoint, RAW)
        begun = {key: raw[key].to(torch.float32, copy=True) for key, _ in self.network.named_parameters()}
        averages = {name: checkpoint["ema"].get(name, begun) for name in self.ema.decays}
        self.ema.load_state_dict({"averages": averages, "updates": checkpoint["ema_updates"]})
        loop = self.trainer.fit_loop.state_dict()
        count_batches(loop, checkpoint["global_step"], self.trainer.accumulate_grad_batches)
        checkpoint["loops"] = {"fit_loop": loop}  # the file's own counts have no say: all of them follow from the step


def count_batches(loop: dict[str, Any], step: int, accumulate: int) -> None:
    """Make Lightning count on from a step, whatever the micro-batches were until then, in its one endless epoch.

    Args:
        loop: the state of a fit loop that has not begun; changed in place.
        step: finished optimizer steps.
        accumulate: micro-batches per step from now on.
    """
    batches = step * accumulate
    count = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}  # as it is at a save
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    steps = {"ready": step, "completed": step}
    for key, counts in (
        ("epoch_loop.batch_progress", count),
        ("epoch_progress", epoch),
        ("epoch_loop.scheduler_progress", steps),
    ):
        loop[key].update(total=dict(counts), current=dict(counts))
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    optimizer["step"].update(total=dict(steps), current=dict(steps))
    optimizer["zero_grad"].update(total=steps | {"started": step}, current=steps | {"started": step})
    loop["epoch_loop.state_dict"] = {"_batches_that_stepped": step - 1}  # likewise


def condition_of(batch: dict[str, Tensor]) -> Condition:
    """The condition of a batch of plain tensors."""
    return Condition(label=batch["label"])
