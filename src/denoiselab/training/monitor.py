"""What a run says of itself while it trains: loss, loss by noise level, gradient norm, learning rate, images/s."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path as DiffusionPath
from denoiselab.training.logs import log_metrics
from denoiselab.training.module import DiffusionModule, condition_of

EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


def bin_names() -> list[str]:
    """Names of the noise-level bins, from most noise to least."""
    inner = [f"{low:g}_to_{high:g}" for low, high in itertools.pairwise(EDGES)]
    return [f"below_{EDGES[0]:g}", *inner, f"above_{EDGES[-1]:g}"]


class TrainingMonitor(Callback):
    """Logs, every `every` optimizer steps, the mean over all samples of all ranks since the last time.

    `train/loss`, `train/loss_by_log_snr/<bin>` (bins by log-SNR, comparable between paths), `train/grad_norm` (before
    clipping), `train/lr`, `train/images_per_second` (waiting for data counts; validation, sampling and saving do not). List it
    before callbacks that take time.

    Args:
        every: optimizer steps between rows, at least 1.
    """

    def __init__(self, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.every = every
        self.sums = torch.zeros(2, len(EDGES) + 1)
        self.edges = torch.tensor(EDGES, dtype=torch.float64)
        self.latest: dict[str, float] = {}
        self._seconds, self._samples = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin counting."""
        self.sums = torch.zeros(2, len(EDGES) + 1, dtype=torch.float64, device=pl_module.device)
        self.edges = self.edges.to(pl_module.device)
        assert isinstance(pl_module, DiffusionModule)
        pl_module.waiting_since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; log if a multiple of `every` has just been reached."""
        assert isinstance(pl_module, DiffusionModule)
        self._seconds += time.perf_counter() - pl_module.waiting_since
        objective, t = pl_module.objective, outputs["t"]
        which = torch.bucketize(objective.path.log_snr(t), self.edges)
        weight = objective.time_sampling.weight(objective.path, t)
        losses = outputs["losses"].to(self.sums.dtype)
        self.sums.index_put_((torch.zeros_like(which), which), losses, accumulate=True)
        counts = weight.to(losses)  # 1, but for times drawn by importance, whose losses carry this weight
        self.sums.index_put_((torch.ones_like(which), which), counts, accumulate=True)
        self._samples += len(losses)
        step_done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if step_done and trainer.global_step % self.every == 0:
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validation is not training time."""
        assert isinstance(pl_module, DiffusionModule)
        pl_module.waiting_since = time.perf_counter()

    def _log(self, trainer: lightning.Trainer, module: DiffusionModule) -> None:
        sums = trainer.strategy.reduce(self.sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        total, count = sums.tolist()
        self.latest = {
            "train/loss": sum(total) / sum(count),
            "train/grad_norm": float(module.grad_norm),
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_per_second": self._samples * trainer.world_size / max(self._seconds, 1e-9),
            **{
                f"train/loss_by_log_snr/{name}": t / c
                for name, t, c in zip(bin_names(), total, count, strict=True)
                if c > 0
            },
        }
        log_metrics(trainer, self.latest)
        self.sums.zero_()
        self._seconds, self._samples = 0.0, 0


class NoiseLevelValidation(Callback):
    """Denoising error of the averaged weights on the test split, at fixed noise levels with fixed noise.

    `val/x0_mse/log_snr_<λ>` is the mean squared error of x0 and `val/epsilon_mse/log_snr_<λ>` that of ε, at the same λ and ε
    for every objective and path, so that unlike runs can be compared; `val/x0_mse` and `val/epsilon_mse` are their means.
    Guidance is not applied.

    Args:
        log_snrs: the levels λ; a path that does not reach one skips it.
    """

    def __init__(self, *, log_snrs: list[float]) -> None:
        if not log_snrs:
            raise ValueError("log_snrs=[]: needs at least one level")
        self.log_snrs = log_snrs
        self.latest: dict[str, float] = {}
        self.errors = torch.zeros(0)

    def levels(self, path: DiffusionPath) -> list[float]:
        """The levels within the path's range."""
        ends = path.log_snr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64)).tolist()
        return [level for level in self.log_snrs if ends[0] <= level <= ends[1]]

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin with empty sums: a row for x0, one for ε, and the count."""
        self.errors = torch.zeros(3, len(self.log_snrs), dtype=torch.float64, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        assert isinstance(pl_module, DiffusionModule)
        path, condition = pl_module.objective.path, condition_of(batch)
        x0 = pl_module.codec.encode(batch["image"])
        with pl_module.denoiser(guided=False) as denoiser:
            for level in self.levels(path):
                k = self.log_snrs.index(level)
                t = path.t_of_log_snr(torch.tensor(level, dtype=torch.float64)).clamp(path.t_min, path.t_max)
                eps = NoiseSource(0, batch["index"]).normal(f"validation {level:g}", x0.shape[1:])
                x_t = float(path.alpha(t)) * x0 + float(path.sigma(t)) * eps
                guess = denoiser(x_t, t, condition)
                self.errors[0, k] += (guess.x0 - x0).square().flatten(1).mean(1).sum()
                self.errors[1, k] += (guess.eps - eps).square().flatten(1).mean(1).sum()
                self.errors[2, k] += len(x0)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reduce over the ranks and log."""
        errors = trainer.strategy.reduce(self.errors, reduce_op="sum")
        assert isinstance(errors, Tensor)
        x0, eps, count = errors.tolist()
        rows = {
            f"{level:g}": (a / c, b / c) for level, a, b, c in zip(self.log_snrs, x0, eps, count, strict=True) if c > 0
        }
        if not rows:
            return
        self.latest = {f"val/x0_mse/log_snr_{level}": a for level, (a, _) in rows.items()}
        self.latest |= {f"val/epsilon_mse/log_snr_{level}": b for level, (_, b) in rows.items()}
        self.latest["val/x0_mse"] = math.fsum(a for a, _ in rows.values()) / len(rows)
        self.latest["val/epsilon_mse"] = math.fsum(b for _, b in rows.values()) / len(rows)
        log_metrics(trainer, self.latest)
