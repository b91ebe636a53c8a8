"""When checkpoints are written, which are kept, and which is the best."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.callbacks import Callback

from denoiselab.runs.checks import show
from denoiselab.runs.files import read_json
from denoiselab.training.checkpoint import FOLDER, checkpoints_of, flaw_of, step_name, step_of, written_step
from denoiselab.training.checkpoint_io import AtomicCheckpointIO, link_atomically, write_atomically
from denoiselab.training.health import check_health

BEST, BEST_NOTE = "best.ckpt", "best.json"
_GB = 1e9
log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves checkpoints/step_0000800.ckpt every `every` optimizer steps and at the end, and keeps the newest and the best.

    A periodic save that fails (a full disk, no permission) is an error in the log, and training goes on; the last one of a run
    raises. A file is deleted only once `keep` newer ones have been read back and found good. The best is best.ckpt, another
    name of the same file, and best.json says why; where that cannot be written, the file waits for it and is not deleted.
    List it after the callbacks that measure.

    Args:
        every: optimizer steps between checkpoints, at least 1.
        keep: how many of the newest to keep, at least 2: one may be damaged. The best is kept as well, and may be one of them:
            of three, two are left beside it.
        best: a number in the `latest` of a callback, such as val/x0_mse, of steps that are both measured and saved; None keeps
            no best.
        best_mode: whether the least or the greatest value is the best; what is not finite never is.
        asynchronous: write on a background thread; training waits for the copy to CPU memory alone.
        reserve_gb: a warning is logged, at the start and before each save, when less space than this (10⁹ bytes) is left on
            the disk; at least 0.

    Attributes:
        last_failure: what went wrong with the last save, naming the file, on every rank; None if nothing did.
    """

    def __init__(
        self,
        *,
        every: int,
        keep: int = 2,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        asynchronous: bool = False,
        reserve_gb: float = 1.0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        if keep < 2:
            raise ValueError(f"keep={keep}: must be at least 2")
        if not reserve_gb >= 0:
            raise ValueError(f"reserve_gb={reserve_gb}: must be at least 0")
        self.every, self.keep, self.best, self.best_mode = every, keep, best, best_mode
        self.asynchronous, self.reserve_gb = asynchronous, reserve_gb
        self.last_failure: str | None = None
        self._saved = self._pending = 0  # the last step that is on the disk, and the one that is being written
        self._known: dict[str, tuple[int, int, str | None]] = {}  # name → size, mtime_ns and what verify said
        self._seen: dict[str, float] | None = None  # the `latest` that the best's number was last found in
        self._measured: dict[int, float] = {}  # that number, by its step; of steps that may still be saved
        self._best: tuple[int, float] | None = None  # the step of best.ckpt, and its number
        self._owed: tuple[int, float] | None = None  # the same of a better one, which is not best.ckpt yet

    @property
    def most_files(self) -> int:
        """The checkpoints that are on the disk at once at most: those kept, the best, and the one being written."""
        return self.keep + 1 + (self.best is not None)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Tell the writer how to write, and find the best of an earlier start of the run."""
        _writer(trainer).asynchronous = self.asynchronous
        if trainer.is_global_zero:
            self._warn_of_space(trainer)
            if self.best is not None:
                self._read_best(_folder(trainer))

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The checkpoint that a run goes on from need not be written again."""
        step = checkpoint["global_step"]
        if trainer.ckpt_path is not None:
            path = Path(trainer.ckpt_path).resolve()
            self._saved = step if path == (_folder(trainer) / step_name(step)).resolve() else 0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Take the step that a run goes on from for the best if it is: perhaps it was stopped just before."""
        self._look(trainer)
        self._choose_best(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Save this step, unless it is saved already; to be called on all ranks. What fails is in `last_failure`.

        Raises:
            NonFiniteError: if a loss or gradient up to here is not finite, and the run may not go on.
        """
        step = trainer.global_step
        if step in (self._saved, self._pending):
            return
        check_health(trainer)
        self.settle(trainer)
        if trainer.is_global_zero:
            self._warn_of_space(trainer)
        self._pending = step
        try:
            trainer.save_checkpoint(_folder(trainer) / step_name(step), weights_only=False)
        except BaseException:
            self._pending = 0  # it was interrupted: there is nothing to finish
            raise
        if not self.asynchronous:
            self.settle(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save when a multiple of `every` has just been reached."""
        self._look(trainer)
        if trainer.global_step % self.every == 0 and trainer.global_step > 0:
            self.save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Take this step for the best if it is: validation comes after saving."""
        self._look(trainer)
        self._choose_best(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save the end of the run.

        Raises:
            RuntimeError: if that fails.
        """
        finished = trainer.global_step >= trainer.max_steps
        if finished:
            self.save(trainer)
        self.settle(trainer)
        if finished and self.last_failure is not None:
            raise RuntimeError(self.last_failure)
        if finished and self.best is not None and not self._measured and trainer.is_global_zero:
            log.warning("best=%s: nothing has measured it, so there is no new %s", self.best, BEST)

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Finish what is being written. Other ranks may be gone, so nothing is asked of them."""
        if self._pending:
            try:
                if trainer.is_global_zero:
                    self._finish(trainer)
            except Exception as error:  # must not hide the first cause
                log.error("checkpoint=%s: could not be written (%s)", step_name(self._pending), error)
            self._pending = 0

    def settle(self, trainer: lightning.Trainer) -> None:
        """Wait for the save that is being written, and let every rank know how it ended; to be called on all ranks."""
        if not self._pending:
            return
        try:
            self.last_failure = trainer.strategy.broadcast(self._finish(trainer) if trainer.is_global_zero else None)
        except Exception:  # a mistake in the program: that save is over; an interrupted one is waited for again
            self._pending = 0
            raise
        if self.last_failure is None:
            self._saved = self._pending
        self._pending = 0

    def _finish(self, trainer: lightning.Trainer) -> str | None:
        """On rank 0: what went wrong with the save; if nothing did, the best is chosen and old files go."""
        folder, failure = _folder(trainer), _writer(trainer).wait()
        path = folder / step_name(self._pending)
        if failure is not None:
            line = f"checkpoint={path}: could not be written ({_reason(failure)})"
            log.error("%s; the run goes on, and the checkpoints before it stay", line)
            return line
        self._remember(path, None)
        self._choose_best(trainer, self._pending)
        try:
            self._prune(folder, self._pending)
        except OSError as error:
            log.error("%s: old checkpoints could not be deleted (%s)", folder, _reason(error))
        return None

    def _warn_of_space(self, trainer: lightning.Trainer) -> None:
        """Say so if there is little space left."""
        folder = _folder(trainer)
        with suppress(OSError):  # the save will say so
            left = _free(folder)
            if left < self.reserve_gb * _GB:
                log.warning(
                    "%s: only %.3g GB are left on its disk (reserve_gb=%g)", folder, left / _GB, self.reserve_gb
                )

    def _prune(self, folder: Path, step: int) -> None:
        """Delete what is older than `keep` good ones. Later steps, of a run that went on from an earlier one, stay."""
        good = 0
        for path in reversed([path for path in checkpoints_of(folder) if (step_of(path) or 0) <= step]):
            if good < self.keep:
                good += self._is_good(path)
                continue
            if self._owed is not None and step_of(path) == self._owed[0]:
                continue  # its other name could not be made yet
            try:
                os.unlink(path)
            except OSError as error:
                log.warning("checkpoint=%s: could not be deleted (%s)", path, _reason(error))

    def _is_good(self, path: Path) -> bool:
        """Whether a file is as it was written; read once, as long as its size and time stay."""
        try:
            state = os.stat(path)
        except OSError:
            return False
        known = self._known.get(path.name)
        if known is not None and known[:2] == (state.st_size, state.st_mtime_ns):
            return known[2] is None
        why = flaw_of(path)
        self._remember(path, why)
        if why is not None:
            log.warning("checkpoint=%s: %s; it does not count as one to keep", path, why)
        return why is None

    def _remember(self, path: Path, why: str | None) -> None:
        with suppress(OSError):  # then it is read once more
            state = os.stat(path)
            self._known[path.name] = (state.st_size, state.st_mtime_ns, why)

    def _look(self, trainer: lightning.Trainer) -> None:
        """Note the best's number if a callback has just measured it: each time it does, its `latest` is a new dict."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            latest = getattr(callback, "latest", {})
            if self.best in latest and latest is not self._seen:
                self._seen = latest
                self._measured = {s: v for s, v in self._measured.items() if s in (self._saved, self._pending)}
                self._measured[trainer.global_step] = float(latest[self.best])

    def _choose_best(self, trainer: lightning.Trainer, step: int | None = None) -> None:
        """On rank 0: make the checkpoint of a step the best, if its number is."""
        step = self._saved if step is None else step
        if not trainer.is_global_zero:
            return
        folder, value = _folder(trainer), self._measured.get(step, math.nan)
        sign, rival = (1 if self.best_mode == "min" else -1), self._owed or self._best
        better = math.isfinite(value) and (rival is None or sign * value < sign * rival[1])
        if better and self._is_good(folder / step_name(step)):
            self._owed = (step, value)
        self._link_best(folder)

    def _link_best(self, folder: Path) -> None:
        """Make the better one best.ckpt, if there is one; where that fails, it is tried again later."""
        if self._owed is None:
            return
        step, value = self._owed
        note: dict[str, Any] = {"step": step, "metric": self.best, "value": value, "mode": self.best_mode}
        if self._best is not None:
            note["before"] = dict(zip(("step", "value"), self._best, strict=True))
        try:
            # The note first: a crash between the two is mended by `_read_best`, since the step's own file is still there.
            write_atomically(folder / BEST_NOTE, lambda file: file.write(f"{json.dumps(note)}\n".encode()))
            link_atomically(folder / step_name(step), folder / BEST)
            self._best, self._owed = self._owed, None
        except OSError as error:
            log.error("checkpoint=%s: could not be written (%s)", folder / BEST, _reason(error))
            if isinstance(error, FileNotFoundError):  # somebody has deleted it
                self._owed = None

    def _read_best(self, folder: Path) -> None:
        """Take over the best of an earlier start, or what it was about to make the best."""
        note, self._best, self._owed = folder / BEST_NOTE, None, None
        try:
            if not note.exists():
                return
            read = read_json(note)
            if (read["metric"], read["mode"]) != (self.best, self.best_mode):
                log.warning("%s: is of %s (%s); it begins anew", note, show(read["metric"]), show(read["mode"]))
                return
            noted = [(int(of["step"]), float(of["value"])) for of in (read, read.get("before")) if of is not None]
            if not all(math.isfinite(value) for _, value in noted):
                raise ValueError("a value is not finite")
            held = written_step(folder / BEST)
            self._best = next((best for best in noted if best[0] == held), None)
            if self._best != noted[0]:
                if self._is_good(folder / step_name(noted[0][0])):
                    self._owed = noted[0]
                elif self._best is None:
                    raise ValueError(f"{BEST} is not of step {noted[0][0]}")
                else:
                    log.warning("%s: is of step %d, and its checkpoint is gone", note, noted[0][0])
        except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            log.warning("%s: cannot be used (%s: %s); the best begins anew", note, type(error).__name__, error)
            return
        self._link_best(folder)


def save_now(trainer: lightning.Trainer) -> None:
    """Save this step, on the disk when this returns, unless that fails or is done already; to be called on all ranks."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Checkpoints):
            callback.save(trainer)
            callback.settle(trainer)


def checkpoint_bytes(parameters: int, averages: int, moments: int = 2) -> int:
    """The bytes of a checkpoint: float32 weights, their averages and the optimizer's moments.

    Args:
        parameters: of the network.
        averages: how many of the weights are kept.
        moments: numbers that the optimizer keeps per parameter; Adam's are 2.
    """
    return 4 * parameters * (1 + averages + moments)


def written_bytes(folder: Path) -> int:
    """The bytes of the files in a folder, each counted once under however many names; 0 if there is none."""
    files = {(state.st_dev, state.st_ino): state.st_size for state in map(os.stat, folder.glob("*"))}
    return sum(files.values())


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin where the checkpoints will not fit.

    Args:
        folder: to be written to; it need not be there yet.
        needed_bytes: of all checkpoints that are there at once.

    Raises:
        ValueError: if the disk has less free space.
    """
    free = _free(folder)
    if free < needed_bytes:
        raise ValueError(
            f"runs={folder}: has {free / _GB:.3g} GB free, and checkpoints of this run need {needed_bytes / _GB:.3g} GB"
        )


def _free(folder: Path) -> int:
    """The free bytes of the disk of a folder, which need not be there yet."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _folder(trainer: lightning.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _writer(trainer: lightning.Trainer) -> AtomicCheckpointIO:
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, AtomicCheckpointIO)
    return writer


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
