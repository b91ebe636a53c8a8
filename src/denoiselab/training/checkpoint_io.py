"""Writing checkpoints, so that a crash, a full disk or a pulled plug at any moment never costs the last good one.

A new file is complete, on the disk and read back under a hidden name in the same folder before it takes its own name, and the
name is on the disk before anything else happens: write, fsync, verify, rename, fsync of the folder. Lightning's own writer
stages the file elsewhere and moves it over the old one without an fsync; its asynchronous one copies tensors but not plain
data, queues without limit and raises an error one save late, on rank 0 alone.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from denoiselab.runs.files import make_durably, sync_folder
from denoiselab.training.checkpoint import NotPlainError, load_checkpoint, read_back

_RESUMED = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "pytorch-lightning_version": str}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to our files.

    Lightning saves on rank 0 alone and lets the other ranks wait at a barrier behind it, so a failure to write does not
    escape there: it is kept in `failure`, to be asked for afterwards.

    Args:
        asynchronous: copy what is to be saved to CPU memory and write it on one background thread, with the very same
            function; the next save waits for the one before.

    Attributes:
        failure: why the last finished save failed; None if it did not.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.failure: OSError | None = None
        self._cleaned: set[Path] = set()
        self._executor: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one checkpoint, or begin to."""
        self.wait()
        if not self.asynchronous:
            self._save(checkpoint, Path(path))
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = self._executor.submit(self._save, _on_cpu(checkpoint), Path(path))

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            if path.parent not in self._cleaned:
                _remove_partials(path.parent)
                self._cleaned.add(path.parent)
            write_checkpoint(checkpoint, path)
            self.failure = None
        except OSError as error:
            self.failure = error

    def wait(self) -> OSError | None:
        """Why the last save failed, once it has ended; None if it did not fail."""
        if self._running is not None:
            try:
                self._running.result()
            finally:
                if self._running.done():  # else it was the wait that was interrupted
                    self._running = None
        return self.failure

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint to go on from, as plain data on the CPU, whatever Lightning asks for.

        Raises:
            ValueError: if the file is no good, or holds weights alone.
        """
        return load_run(Path(path))

    def teardown(self) -> None:
        """End the background thread, once it has written; a later save starts another one."""
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None


def load_run(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can go on from, as plain data on the CPU.

    Raises:
        ValueError: if the file is no good, or holds weights alone.
    """
    loaded = load_checkpoint(path)
    for key, kind in _RESUMED.items():
        if not isinstance(loaded.get(key), kind):
            raise ValueError(
                f"checkpoint={path}: has no {key}; it holds weights for init_from=, not a run to go on with"
            )
    return loaded


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write plain data and tensors, verified; the folder is made if it is not there.

    Raises:
        OSError: if the disk is full or not writable, or does not give back what was written; `path` is then as it was.
        TypeError: if it is not plain data, which is a mistake in the program and none of the disk.
    """
    make_durably(path.parent)
    needed, free = sum(_sizes(checkpoint)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free")
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, file), read_back)
    except NotPlainError as error:
        raise TypeError(
            f"checkpoint={path}: cannot be saved: {error.flaw}; the state of a callback, say, has to be tensors, numbers, "
            "strings, None, and lists and dicts of these"
        ) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], check: Callable[[Path], str | None] | None = None
) -> None:
    """Give a file new content, all of it or none.

    Args:
        path: in a folder that exists.
        write: writes the content.
        check: of the written file, before it takes its name; says what is wrong with it, or None.

    Raises:
        OSError: if that fails; `path` is then as it was.
    """
    partial = _partial(path)
    # Not written into: a crash within `link_atomically` may have left it as another name of a good file.
    _remove(partial)
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            with suppress(OSError, AttributeError):  # so that the check reads the disk and not this machine's memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reason = check(partial) if check else None
        if reason is not None:
            raise OSError(errno.EIO, f"what was written does not read back: {reason}")
        os.replace(partial, path)
    except RuntimeError as error:  # torch's writer says so in place of the system's error, which it had before
        cause = error.__context__ if isinstance(error.__context__, OSError) else None
        raise OSError(*(cause.args[:2] if cause else (errno.EIO, str(error).splitlines()[0]))) from error
    finally:
        _remove(partial)
    sync_folder(path.parent)


def link_atomically(source: Path, path: Path) -> None:
    """Make `path` another name of a checkpoint, or a copy of it where it lies on another disk, or on one without links.

    Raises:
        OSError: if that fails; `path` is then as it was.
    """
    partial = _partial(path)
    _remove(partial)
    try:
        os.link(source, partial)
    except OSError:
        with open(source, "rb") as original:
            write_atomically(path, lambda file: shutil.copyfileobj(original, file), read_back)
        return
    try:
        os.replace(partial, path)
    finally:
        _remove(partial)  # still there if both were names of one file already
    sync_folder(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove_partials(folder: Path) -> None:
    """Remove what a crash has left half written."""
    for left in folder.glob(".*.partial"):
        _remove(left)


def _remove(path: Path) -> None:
    with suppress(OSError):  # not there, or a disk that takes nothing any more: whoever writes next will say so
        os.unlink(path)


def _on_cpu(value: Any) -> Any:
    """A copy of plain data and tensors that nothing on the training path changes."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its own type, with what a state dict notes beside its tensors
        for key, item in value.items():
            copied[key] = _on_cpu(item)
        return copied
    if isinstance(value, list | tuple):
        return type(value)([_on_cpu(item) for item in value])
    return copy.deepcopy(value)


def _sizes(value: Any) -> Iterator[int]:
    """The bytes of each tensor in plain data."""
    if isinstance(value, Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _sizes(item)
