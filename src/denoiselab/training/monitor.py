"""What a run says of itself while it trains: loss, loss by noise level, gradient norm, learning rate, images/s."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from denoiselab.data.dataset import LazyImages
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path as DiffusionPath
from denoiselab.training.history import METRICS, SECONDS, TRACE, append_rows, read_rows, surviving
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
    clipping), `train/lr`, `train/images_per_second` (waiting for data counts; validation, sampling and saving do not),
    `train/seconds` (of the same time, summed over all starts of the run; an x-axis, so validation and measurements log it
    with theirs at whatever step), and
    `train/skipped_steps` and `data/skipped` (draws of images that could not be decoded), if there were any; each such image is
    named once in the log. Also writes trace.csv, a row for each step: its loss and gradient norm, and a
    number that stands for which samples it saw at which places; a replay is held to it. Nothing is read from the device
    in between. List it before callbacks that take time.

    Args:
        every: optimizer steps between rows, at least 1.
    """

    def __init__(self, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.every = every
        self.edges = torch.tensor(EDGES, dtype=torch.float64)
        self.latest: dict[str, float] = {}
        self.micro_batches: list[Tensor] = []  # of the step that is under way
        self.steps: list[
            Tensor
        ] = []  # finished since they were last read: see `_of_micro_batch`, and the gradient norm
        self.window: list[list[float]] = []  # the same of all ranks, since the last row
        self.trace: list[dict[str, Any]] = []  # rows that the disk has not taken yet
        self.drawn: list[Tensor] = []  # since steps were last read: indices, as `~index` where another image stood in
        self._trainer: lightning.Trainer | None = None
        self._seconds, self._samples = 0.0, 0
        self._before = 0.0  # seconds of training before the last row

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin counting."""
        assert isinstance(pl_module, DiffusionModule)
        self.edges = self.edges.to(pl_module.device)
        self._trainer = trainer
        rows = read_rows(Path(trainer.default_root_dir) / METRICS)  # of earlier starts
        self._before = max((float(row[SECONDS]) for row in rows if row.get(SECONDS)), default=0.0)
        pl_module.clock = {SECONDS: self._before}
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
        pl_module.clock = {SECONDS: self._before + self._seconds}
        self._samples += len(outputs["losses"])
        self.drawn.append(torch.where(batch["stand_in"] > 0, ~batch["index"], batch["index"]))
        self.micro_batches.append(self._of_micro_batch(pl_module, outputs, batch))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        norm = pl_module.grad_norm.to(self.micro_batches[0]).reshape(1)
        self.steps.append(torch.cat([torch.stack(self.micro_batches).sum(0), norm]))
        self.micro_batches = []
        if trainer.global_step % self.every == 0:
            self.read()
            self._log(trainer, pl_module)

    def _of_micro_batch(self, module: DiffusionModule, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Sums of the losses and of their weights in each bin, stand-ins, and the number for its samples; float64."""
        objective, t = module.objective, outputs["t"]
        which = torch.bucketize(objective.path.log_snr(t), self.edges)
        sums = torch.zeros(2, len(EDGES) + 1, dtype=torch.float64, device=t.device)
        # 1, but for times drawn by importance, whose losses carry this weight
        counts = objective.time_sampling.weight(objective.path, t)
        sums[0].index_add_(0, which, outputs["losses"].to(sums))
        sums[1].index_add_(0, which, counts.to(sums))
        samples = torch.stack([batch["stand_in"].sum(), fingerprint(self.drawn[-1], batch["place"])])
        return torch.cat([sums.flatten(), samples.to(sums)])

    def read(self) -> None:
        """Read the finished steps from the device, sum over the ranks, and write trace.csv; to be called on all ranks."""
        trainer, steps = self._trainer, self.steps
        if trainer is None or not steps:
            return
        mine = torch.stack(steps)
        everyone = mine if trainer.world_size == 1 else torch.stack(list(trainer.strategy.all_gather(mine)))
        totals = everyone.reshape(-1, *mine.shape).sum(0)  # in the order of the ranks
        totals[:, -1] = mine[:, -1]
        rows = totals.tolist()
        self.steps, self.window = [], [*self.window, *rows]
        self._name_broken(trainer, any(row[-3] for row in rows))
        if not trainer.is_global_zero:
            return
        first = trainer.global_step - len(rows) + 1
        bins = len(EDGES) + 1
        trace = [
            {
                "step": first + i,
                "loss": repr(sum(row[:bins]) / sum(row[bins : 2 * bins])),
                "grad_norm": repr(row[-1]),
                "samples": int(row[-2]),
            }
            for i, row in enumerate(rows)
        ]
        self.trace += trace
        with surviving(path := Path(trainer.default_root_dir) / TRACE):
            append_rows(path, self.trace)
            self.trace = []

    def _name_broken(self, trainer: lightning.Trainer, some: bool) -> None:
        """Have the data set name the images that others stood in for on any rank."""
        drawn, self.drawn = self.drawn, []
        if not some:  # the same on all ranks
            return
        everyone = trainer.strategy.all_gather(torch.cat(drawn))
        assert isinstance(everyone, Tensor)
        broken = [~index for index in everyone.flatten().tolist() if index < 0]
        samples = trainer.datamodule.train_set()  # type: ignore[attr-defined]
        if trainer.is_global_zero and isinstance(samples, LazyImages):
            samples.tell(broken)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The trace ends with the run."""
        self.read()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, so that its next row is the mean over all of its steps (Lightning asks on all ranks)."""
        self.read()
        return {"window": self.window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the steps since the last row.

        Raises:
            ValueError: if they are not as `read` makes them.
        """
        window, columns = state_dict["window"], 2 * (len(EDGES) + 1) + 3
        for row in window:
            if type(row) is not list or len(row) != columns or {*map(type, row)} != {float}:
                raise ValueError(f"window: must be rows of {columns} numbers")
        self.window = window

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validation is not training time."""
        assert isinstance(pl_module, DiffusionModule)
        pl_module.waiting_since = time.perf_counter()

    def _log(self, trainer: lightning.Trainer, module: DiffusionModule) -> None:
        bins = len(EDGES) + 1
        finite = [row for row in self.window if all(map(math.isfinite, row))]  # a skipped step has taught nothing
        columns = [math.fsum(column) for column in zip(*finite, strict=True)] or [0.0] * (2 * bins)
        total, count = columns[:bins], columns[bins : 2 * bins]
        self.latest = {
            "train/loss": sum(total) / sum(count) if finite else math.nan,
            "train/grad_norm": self.window[-1][-1],
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_per_second": self._samples * trainer.world_size / max(self._seconds, 1e-9),
            **module.clock,
            **{
                f"train/loss_by_log_snr/{name}": t / c
                for name, t, c in zip(bin_names(), total, count, strict=True)
                if c > 0
            },
        }
        if len(finite) < len(self.window):
            self.latest["train/skipped_steps"] = len(self.window) - len(finite)
        if stand_ins := sum(row[-3] for row in self.window):
            self.latest["data/skipped"] = stand_ins
        log_metrics(trainer, self.latest)
        self._before += self._seconds
        self.window, self._seconds, self._samples = [], 0.0, 0


def fingerprint(index: Tensor, place: Tensor) -> Tensor:
    """A whole number below 2^52 that stands for which samples are at which places of a batch, whatever the order.

    A sum of 32-bit hashes, so that ranks and micro-batches add up; exact in float64 for batches of up to a million.

    Args:
        index: of the samples in the data set, `~index` where another one stands in, int64 of shape (B,).
        place: of the samples in the global batch, int64 of shape (B,).
    """
    mixed = index * 0x9E3779B97F4A7C1 + place * 0x2545F4914F6CDD1D + 0x1B873593
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return ((mixed ^ (mixed >> 32)) & 0xFFFFFFFF).sum()


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

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate first if the run was stopped between the checkpoint of a step and the validation of the same step."""
        step, loop = trainer.global_step, trainer.fit_loop.epoch_loop
        due = (
            step > 0
            and trainer.val_check_batch
            and step * trainer.accumulate_grad_batches % trainer.val_check_batch == 0
        )
        if not due:
            return
        self.latest = trainer.strategy.broadcast(self._logged(trainer))
        if self.latest:
            return
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True

    def _logged(self, trainer: lightning.Trainer) -> dict[str, float]:
        """What an earlier start of the run has found at this step."""
        rows = read_rows(Path(trainer.default_root_dir) / METRICS)
        row = next((row for row in rows if int(row["step"]) == trainer.global_step), {})
        return {key: float(value) for key, value in row.items() if key.startswith("val/") and value}

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
        assert isinstance(pl_module, DiffusionModule)
        log_metrics(trainer, self.latest | pl_module.clock)
