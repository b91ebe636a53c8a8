"""Lightning's Trainer with the settings that this project stands on."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DDPStrategy

from denoiselab.runs.launch import PATIENCE
from denoiselab.training.checkpoint_io import AtomicCheckpointIO

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class TrainerSettings:
    """Where and how long to train.

    Args:
        accelerator: "cpu", "gpu" or "auto" (a GPU where there is one).
        devices: processes on this machine, one device each; "auto" is every GPU, or one process on the CPU.
        num_nodes: machines.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        max_steps: optimizer steps, at least 1.
        accumulate: micro-batches per optimizer step and process, at least 1.
        gradient_clip: largest global gradient norm; None does not clip.
        val_every: optimizer steps between validations, at least 1.
        threads: CPU threads per process; None shares the idle cores among the processes.

    Raises:
        ValueError: if a value is out of range, or a GPU is asked for where there is none.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["cpu", "gpu", "auto"],
        devices: int | Literal["auto"],
        max_steps: int,
        num_nodes: int = 1,
        precision: Precision = "32-true",
        accumulate: int = 1,
        gradient_clip: float | None = None,
        val_every: int,
        threads: int | None = None,
    ) -> None:
        gpus = torch.cuda.device_count()
        if accelerator == "gpu" and gpus == 0:
            raise ValueError("accelerator=gpu: this machine has no GPU; use trainer=cpu")
        self.accelerator = "gpu" if accelerator != "cpu" and gpus else "cpu"
        self.devices = (gpus if self.accelerator == "gpu" else 1) if devices == "auto" else int(devices)
        if self.accelerator == "gpu" and self.devices > gpus:
            raise ValueError(f"devices={devices}: this machine has {gpus} GPUs")
        if self.accelerator == "cpu" and self.devices > max(64, os.cpu_count() or 1):
            raise ValueError(f"devices={devices}: this machine has {os.cpu_count()} cores")
        at_least_one = {
            "devices": self.devices,
            "num_nodes": num_nodes,
            "max_steps": max_steps,
            "accumulate": accumulate,
            "val_every": val_every,
            "threads": 1 if threads is None else threads,
        }
        for key, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{key}={value}: must be at least 1")
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"gradient_clip={gradient_clip}: must be positive, or null for none")
        self.num_nodes, self.precision, self.max_steps = num_nodes, precision, max_steps
        self.accumulate, self.gradient_clip, self.val_every = accumulate, gradient_clip, val_every
        self.threads = threads

    @property
    def world_size(self) -> int:
        """Processes over all machines."""
        return self.devices * self.num_nodes

    def choose_threads(self, then: Any = None) -> int:
        """CPU threads for each process; to be asked before the processes are started, while the cores are still free.

        Args:
            then: what a file says of the last start: with another number, sums are rounded otherwise.
        """
        return self.threads or free_cores(self.devices, then=then)

    def build(self, run_dir: Path, loggers: list[Logger], callbacks: list[Callback]) -> lightning.Trainer:
        """The Trainer of a run."""
        trainer = lightning.Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            strategy=DDPStrategy(timeout=PATIENCE) if self.world_size > 1 else "auto",
            precision=self.precision,
            max_steps=self.max_steps,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.gradient_clip,
            # Validation counts steps, not epochs: training draws from an endless stream.
            val_check_interval=self.val_every * self.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the datamodule shares the samples out itself
            default_root_dir=run_dir,
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,  # Lightning's own; ours is the callback `Checkpoints`
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit_loop.__class__ = _WholeFitLoop
        # Signals are the business of `StopOnSignal`: Lightning's handlers call collectives, and requeue Slurm's jobs, from
        # inside a handler, and its loop asks all ranks at each micro-batch whether one of them has had a SIGTERM.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        return trainer


class _WholeFitLoop(_FitLoop):
    """Lightning's, which also begins and ends a run that has no steps left: what follows its last step may be missing."""

    @property
    def skip(self) -> bool:
        """Whether to do nothing at all."""
        return False


def free_cores(processes: int = 1, cgroup: Path = Path("/sys/fs/cgroup/cpu.max"), then: Any = None) -> int:
    """CPU threads that each of so many processes can really have, at least 1.

    OMP_NUM_THREADS if it is set; else `then`, if this machine has so many cores, busy or not; else the cores of the affinity
    mask that are idle just now, capped by the container's quota and shared out. On cores that others use, one thread too many
    makes a step many times slower: threads wait spinning.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    if type(then) is int and 0 < then * processes <= (os.cpu_count() or 1):
        return then
    cores: float
    try:
        allowed = os.sched_getaffinity(0)
        before = _idle(allowed)
        time.sleep(0.25)
        after = _idle(allowed)
        ticks = 0.25 * os.sysconf("SC_CLK_TCK")
        cores = sum(min(1.0, (after[core] - before[core]) / ticks) for core in allowed)
    except (AttributeError, OSError, KeyError, ValueError):  # not Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no container, or no quota ("max")
    return max(1, round(cores) // processes)


def _idle(allowed: set[int]) -> dict[int, int]:
    """Clock ticks that each core has been idle since the machine started (proc(5), /proc/stat, fourth column)."""
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    numbered = {int(w[0][3:]): int(w[4]) for w in lines if w[0].startswith("cpu") and w[0] != "cpu"}
    return {core: numbered[core] for core in allowed}
