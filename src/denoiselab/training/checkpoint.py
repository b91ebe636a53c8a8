"""Checkpoints: plain data, written so that a crash never costs the last good one.

A checkpoint is what Lightning saves (`state_dict` with the raw weights under `network.`, optimizer, loops) plus

    schema   version of this layout
    config   the resolved config, plain dicts
    ema      {name: {parameter: float32 tensor}}, every average by its name
    ema_updates

Lightning's own writer stages the file elsewhere and copies it over the old one; here the new file is complete and on disk
before it takes its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

SCHEMA = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one checkpoint.

        Raises:
            OSError: if the disk is full or not writable; the target is then as it was.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.partial")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Checkpoints(Callback):
    """Saves checkpoints/step_0000800.ckpt every `every` optimizer steps and at the end, and keeps the newest ones.

    Args:
        every: optimizer steps between checkpoints, at least 1.
        keep: how many to keep, at least 2: one may be damaged.
    """

    def __init__(self, *, every: int, keep: int = 2) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        if keep < 2:
            raise ValueError(f"keep={keep}: must be at least 2")
        self.every, self.keep = every, keep
        self._saved = 0

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        folder = Path(trainer.default_root_dir) / FOLDER
        trainer.save_checkpoint(folder / f"step_{trainer.global_step:07d}.ckpt")
        if trainer.is_global_zero:
            for old in checkpoints_of(folder)[: -self.keep]:
                old.unlink()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save when a multiple of `every` has just been reached."""
        if trainer.global_step % self.every == 0 and trainer.global_step > 0:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save the end of the run."""
        if trainer.global_step > 0:
            self._save(trainer)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    found = {int(m[1]): p for p in folder.glob("step_*.ckpt") if (m := _NAME.fullmatch(p.name))}
    return [found[step] for step in sorted(found)]


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of the last step of a run.

    Raises:
        ValueError: if the run has none.
    """
    found = checkpoints_of(run_dir / FOLDER)
    if not found:
        raise ValueError(f"run={run_dir}: has no checkpoint in {FOLDER}/")
    return found[-1]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain data on the CPU.

    Raises:
        ValueError: if the file is missing, damaged, holds anything but plain data, or is of another layout.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint={path}: no such file")
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch.save writes a CRC-32 of every tensor; torch.load does not look at it
            if archive.testzip() is not None:
                raise ValueError("checksum differs")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint={path}: cannot be read as plain data; it is damaged, or no checkpoint") from error
    if not isinstance(loaded, dict) or loaded.get("schema") != SCHEMA:
        found = loaded.get("schema") if isinstance(loaded, dict) else None
        raise ValueError(f"checkpoint={path}: layout {found} is not the layout {SCHEMA} that this version reads")
    for key, kind in (("config", dict), ("ema", dict), ("state_dict", dict), ("global_step", int)):
        if not isinstance(loaded.get(key), kind):
            raise ValueError(f"checkpoint={path}: has no {key}; it is damaged, or not of this program")
    return loaded


def network_weights(checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
    """The network's state dict with the weights of that name ("raw" or an average's).

    Raises:
        ValueError: if the checkpoint has no such weights.
    """
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if weights != "raw":
        if weights not in checkpoint["ema"]:
            raise ValueError(f"weights={weights}: the checkpoint has {', '.join([*checkpoint['ema'], 'raw'])}")
        state.update(checkpoint["ema"][weights])
    return state


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of weights: of their names, shapes and bytes."""
    total = hashlib.sha256()
    for key, value in sorted(state.items()):
        total.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
