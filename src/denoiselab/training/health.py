"""What happens after a step whose loss or gradient is not finite, and its incident file.

`Gate` has already held the step back on the device. Here the host looks at it, some steps later on a GPU so that it never
waits, and always at the same step on all ranks.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from denoiselab.runs.errors import RankError
from denoiselab.runs.files import write_text
from denoiselab.training.checkpoint import FOLDER, checkpoints_of
from denoiselab.training.module import DiffusionModule

INCIDENTS = "incidents"
LAG = 8  # on a GPU, so that the look never waits for it

log = logging.getLogger("denoiselab")


class NonFiniteError(RankError):
    """A loss or a gradient was not finite, and the run may not go on; one line."""


@dataclass(frozen=True)
class Step:
    """What is kept of an optimizer step until it is looked at.

    Args:
        number: of the step; its noise is keyed by one less.
        told: (bad steps so far, norm of the gradient), float64 on the host once `arrived`.
        arrived: None where there is nothing to wait for.
        batches: place, index, t and loss of the samples of each micro-batch, of shape (4, B) on the device.
    """

    number: int
    told: Tensor
    arrived: torch.cuda.Event | None
    batches: list[Tensor]


class Health(Callback):
    """Stops a run, or skips the step, when a loss or a gradient is not finite. List it before callbacks that save.

    A bad step changes neither weights nor averages nor the optimizer's state, on any rank; the learning rate's schedule
    goes on. Each one is written to incidents/step_0000123.json.

    Args:
        policy: "stop" at the first bad step, after which nothing moves any more, or "skip" it.
        max_skipped: with "skip", bad steps in the whole run before it stops, at least 1.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(self, *, policy: Literal["stop", "skip"] = "stop", max_skipped: int = 10) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(f"policy={policy}: must be stop or skip")
        if max_skipped < 1:
            raise ValueError(f"max_skipped={max_skipped}: must be at least 1")
        self.policy, self.max_skipped = policy, max_skipped
        self.allowed = max_skipped if policy == "skip" else 0
        self.skipped = 0  # bad steps that have been looked at
        self.lag = 0  # steps between a step and the look at it
        self._batches: list[Tensor] = []  # of the step that is not complete
        self._waiting: deque[Step] = deque()
        self._error: NonFiniteError | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell the module what is allowed, and how many steps a resumed run has skipped.

        Raises:
            NonFiniteError: if it has skipped more than it may.
        """
        assert isinstance(pl_module, DiffusionModule)
        if self.policy == "stop":
            self.allowed = self.skipped  # by an earlier start that was told to
        elif self.skipped > self.max_skipped:
            raise NonFiniteError(f"max_skipped={self.max_skipped}: the run has skipped {self.skipped} steps already")
        self.lag = LAG if pl_module.device.type == "cuda" else 0
        pl_module.gate.allowed = self.allowed
        pl_module.gate.skipped = torch.full((), self.skipped, device=pl_module.device)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Keep what an incident file needs, and look at a step that is old enough.

        Raises:
            NonFiniteError: on all ranks, if it was bad and the run may not go on.
        """
        assert isinstance(pl_module, DiffusionModule)
        seen = (batch["place"], batch["index"], outputs["t"], outputs["losses"])
        self._batches.append(torch.stack([part.double() for part in seen]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        gate = pl_module.gate
        told, arrived = torch.stack((gate.skipped.double(), pl_module.grad_norm.double())), None
        if told.is_cuda:
            on_device, told = told, torch.empty(2, dtype=torch.float64, pin_memory=True)
            told.copy_(on_device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append(Step(trainer.global_step, told, arrived, self._batches))
        self._batches = []
        self._look(trainer, leave=self.lag)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the last steps."""
        self.drain(trainer)

    def drain(self, trainer: lightning.Trainer) -> None:
        """Look at every step so far; to be called on all ranks.

        Raises:
            NonFiniteError: if the run may not go on.
        """
        self._look(trainer, leave=0)

    def _look(self, trainer: lightning.Trainer, leave: int) -> None:
        if self._error is not None:
            raise self._error  # who asks again is told again, without a word between the ranks
        while len(self._waiting) > leave:
            step = self._waiting.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            skipped, norm = step.told.tolist()
            if skipped > self.skipped:
                self._report(trainer, step, norm)
            self.skipped = int(skipped)

    def _report(self, trainer: lightning.Trainer, step: Step, norm: float) -> None:
        """Write the incident file, and log it or raise; all ranks do this at the same step."""
        batches = [parts.tolist() for parts in step.batches]
        ranks = [batches] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(ranks, batches)
        count = self.skipped + 1
        found = incident(ranks, norm) | {"step": step.number, "policy": self.policy, "bad_steps": count}
        file = f"{INCIDENTS}/step_{step.number:07d}.json"
        run_dir = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            try:
                (run_dir / INCIDENTS).mkdir(exist_ok=True)
                write_text(run_dir / file, json.dumps(found) + "\n")
            except OSError as error:  # a full disk must not hide the first cause
                log.warning(f"{file} could not be written ({error})")
        trainer.strategy.barrier()  # or another rank's end could end rank 0 before it has written
        line = f"step {step.number}: {what(found)}; see {file}"
        if count <= self.allowed:
            log.warning(f"{line}; the step is skipped, {count} of at most {self.max_skipped}")
            return
        saved = checkpoints_of(run_dir / FOLDER)
        again = f"resume from {FOLDER}/{saved[-1].name}" if saved else "start again"
        key = f"max_skipped above {self.max_skipped}" if self.policy == "skip" else "policy=skip"
        self._error = NonFiniteError(f"{line}; nothing was updated since: {again} with callbacks.health.{key}")
        raise self._error

    def state_dict(self) -> dict[str, Any]:
        """The bad steps so far: a resumed run goes on counting. To be asked after `drain`."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count over.

        Raises:
            ValueError: if it is no count.
        """
        skipped = state_dict["skipped"]
        if type(skipped) is not int or not 0 <= skipped < 2**63:
            raise ValueError("skipped: must be a number of steps")
        self.skipped = skipped


def check_health(trainer: lightning.Trainer) -> None:
    """Refuse to go on with a run of which a step was bad, unless it may be skipped; to be called by all ranks before a save.

    Raises:
        NonFiniteError: in one line.
    """
    watching = [callback for callback in trainer.callbacks if isinstance(callback, Health)]  # type: ignore[attr-defined]
    for health in watching:
        health.drain(trainer)
    module = trainer.lightning_module
    if not watching and isinstance(module, DiffusionModule) and int(module.gate.skipped) > module.gate.allowed:
        raise NonFiniteError(f"step {trainer.global_step}: a loss or gradient up to here is not finite")


def incident(ranks: list[list[list[list[float]]]], norm: float) -> dict[str, Any]:
    """What the incident file says of the samples of a step.

    Args:
        ranks: place, index, t and loss, each a list, of each micro-batch of each rank.
        norm: of the gradient.

    Returns:
        Plain data: `non_finite`, the samples with such a loss, and `batch`, all of them. Numbers that JSON does not have
        are strings.
    """
    batch: list[dict[str, Any]] = [
        {
            "rank": rank,
            "micro_batch": k,
            "place": [int(p) for p in place],
            "index": [int(i) for i in index],
            "t": t,
            "loss": [plain(value) for value in loss],
        }
        for rank, batches in enumerate(ranks)
        for k, (place, index, t, loss) in enumerate(batches)
    ]
    keys = ("place", "index", "t", "loss")
    non_finite: list[dict[str, Any]] = [
        {"rank": part["rank"], "micro_batch": part["micro_batch"], **dict(zip(keys, sample, strict=True))}
        for part in batch
        for sample in zip(*(part[key] for key in keys), strict=True)
        if isinstance(sample[-1], str)
    ]
    non_finite.sort(key=lambda sample: sample["place"])
    return {"gradient_norm": plain(norm), "non_finite": non_finite, "batch": batch}


def what(found: dict[str, Any]) -> str:
    """What is not finite, in words."""
    samples = found["non_finite"]
    if not samples:
        return f"the gradient is not finite (norm {found['gradient_norm']}; all losses are)"
    first = f"sample {samples[0]['index']} at t={samples[0]['t']:.4g}"
    return f"the loss is not finite ({first}{f' and {len(samples) - 1} more' if len(samples) > 1 else ''})"


def plain(value: float) -> float | str:
    """A number, or the name of one that JSON does not have."""
    return value if math.isfinite(value) else str(value)
