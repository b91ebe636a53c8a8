"""Reading checkpoints: plain data, checked before a byte of it is used. `checkpoint_io` writes them, `saving` decides when.

A checkpoint is what Lightning saves (`state_dict` with the raw weights under `network.`, optimizer, loops) plus

    schema       version of this layout
    config       the resolved config, plain dicts
    ema          {name: {parameter: float32 tensor}}, every average by its name
    ema_updates
    environment  {name: version} of what wrote it; only to be told to people, so files without it are of the same layout

in the zip archive that torch.save writes. That holds a CRC-32 of every entry, which torch.load does not look at.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import lightning
import torch
from torch import Tensor

import denoiselab
from denoiselab.runs.checks import show
from denoiselab.training.pickles import flaw_of_pickle

SCHEMA = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)\.ckpt")
LARGEST_COUNT = 2**63  # no run comes near it, and numbers of thousands of digits cannot even be printed
_UNREADABLE = "cannot be read as plain data ({}); it is damaged, or no checkpoint"
_ZIP = b"PK\x03\x04"
_REQUIRED = {"config": dict, "ema": dict, "ema_updates": int, "state_dict": dict, "global_step": int}
log = logging.getLogger(__name__)


class NotPlainError(ValueError):
    """A file is whole, and it is its content that is no plain data.

    Args:
        flaw: of the content, in a few words.
    """

    def __init__(self, flaw: str) -> None:
        super().__init__(_UNREADABLE.format(flaw))
        self.flaw = flaw


def __getattr__(name: str) -> Any:
    if name == "Checkpoints":  # the configs in older checkpoints name it here
        from denoiselab.training.saving import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def step_name(step: int) -> str:
    """The file name of the checkpoint of a step."""
    return f"step_{step:07d}.ckpt"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's file name; None if it is no such name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first; good or not; none if there is no folder.

    Raises:
        OSError: if it cannot be read, which is not the same.
    """
    try:
        paths = [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    found = {step: path for path in paths if (step := step_of(path)) is not None}
    return [found[step] for step in sorted(found)]


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the last step in a folder that is good (None if none is), and a line on each damaged newer one."""
    damaged: list[str] = []
    for path in reversed(checkpoints_of(folder)):
        reason = flaw_of(path, weights=True)
        if reason is None:
            return path, damaged
        damaged.append(f"checkpoint={path}: {reason}")
    return None, damaged


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of the last step of a run that is good; each damaged newer one is warned of.

    Raises:
        ValueError: if the run has none.
    """
    newest, damaged = newest_valid(run_dir / FOLDER)
    if newest is None:
        why = f"no good checkpoint in {FOLDER}/; {'; '.join(damaged)}" if damaged else f"no checkpoint in {FOLDER}/"
        raise ValueError(f"run={run_dir}: has {why}")
    for line in damaged:
        log.warning("%s; %s is taken instead", line, newest.name)
    return newest


def verify(path: Path) -> str | None:
    """Why a file is no good as a checkpoint, in a few words; None if every byte of it is as it was written.

    Checks the archive, the CRC-32 of every entry and that it unpickles as plain data; tensors are not kept in memory.
    """
    try:
        return read_back(path)
    except (OSError, NotPlainError) as error:
        return _words(error)


def read_back(path: Path) -> str | None:
    """As `verify`, of a file that has just been written.

    Raises:
        OSError: if it cannot be read.
        NotPlainError: if it is as it was written, and that was no plain data.
    """
    try:
        _read(path, "meta")
    except NotPlainError:
        raise
    except ValueError as error:
        return str(error)
    return None


def flaw_of(path: Path, *, weights: bool = False) -> str | None:
    """Why a file is no good as the checkpoint of the step in its name, in a few words; None if it is.

    Args:
        path: named after a step.
        weights: look at these, too, for such as are not finite; else they are not kept in memory.
    """
    try:
        loaded = _read(path, "cpu" if weights else "meta")
        _check_layout(loaded)
        if loaded["global_step"] != step_of(path):
            return f"is of step {loaded['global_step']}"
        if weights:
            _check_finite(loaded)
    except (OSError, ValueError) as error:
        return _words(error)
    return None


def written_step(path: Path) -> int | None:
    """The step that a good checkpoint says it is of, whatever its name; None if it is no good."""
    try:
        step = _read(path, "meta")["global_step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain data on the CPU.

    Raises:
        ValueError: if the file is missing, damaged, holds anything but plain data, or is of another layout.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint={path}: no such file")
    try:
        loaded = _read(path, "cpu")
        _check_layout(loaded)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint={path}: {_words(error)}") from error
    return loaded


def _check_layout(loaded: Any) -> None:
    """See to it that what was read is laid out as this program does.

    Raises:
        ValueError: otherwise.
    """
    schema = loaded.get("schema") if isinstance(loaded, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"layout {_told(schema)} is not the layout {SCHEMA} that this version reads")
    for key, kind in _REQUIRED.items():
        if not isinstance(loaded.get(key), kind) or isinstance(loaded.get(key), bool):
            raise ValueError(f"has no {key}; it is damaged, or not of this program")
    for key in ("ema_updates", "global_step"):
        if not 0 <= loaded[key] < LARGEST_COUNT:
            raise ValueError(f"{key} is {_told(loaded[key])}; it is damaged, or not of this program")
    for key, value in [("state_dict", loaded["state_dict"]), *loaded["ema"].items()]:
        if type(key) is not str or not _is_weights(value):
            raise ValueError(f"{show(key)} is no dict of names and tensors; it is not of this program")


def _check_finite(loaded: dict[str, Any]) -> None:
    """See to it that a run could go on with these weights.

    Raises:
        ValueError: otherwise. A network's buffers may be infinite, as masks are, so infinite parameters show in the averages.
    """
    raw = {key: value for key, value in loaded["state_dict"].items() if key.startswith("network.")}
    wrong = [key for key, value in raw.items() if value.isnan().any()]
    wrong += [
        f"{name}.{key}"
        for name, average in loaded["ema"].items()
        for key, value in average.items()
        if not value.isfinite().all()
    ]
    if wrong:
        raise ValueError(f"{show(wrong[0])} is not finite")


def _told(value: Any) -> str:
    """A value in a few characters, whatever a file holds in its place."""
    plain = value is None or (type(value) in (bool, int) and abs(value) < LARGEST_COUNT)
    return str(value) if plain else f"of type {type(value).__name__}"


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _read(path: Path, device: str) -> Any:
    """What is in a file; on "meta" without the tensors' bytes.

    Raises:
        OSError: if the file cannot be read.
        ValueError: saying what is wrong with it; `NotPlainError` if no byte of it is.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError("is no file")
    with path.open("rb") as file:
        try:  # of one open file: what is checked is what is loaded, even if the name is given to another meanwhile
            why = _flaw_of_archive(file)
            file.seek(0)
            if why is None:
                return torch.load(file, map_location=device, weights_only=True)
        except (OSError, NotPlainError):
            raise
        except Exception as error:  # damaged bytes end in any error that zipfile, the unpickler and torch know
            why = type(error).__name__
    raise ValueError(_UNREADABLE.format(why))


def _flaw_of_archive(file: BinaryIO) -> str | None:
    """What is wrong with an archive that torch.save wrote; None if nothing is.

    Raises:
        NotPlainError: if nothing is but what it holds.
    """
    if file.read(len(_ZIP)) != _ZIP:
        return "no archive of torch.save"
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                return f"{entry.filename!r} is compressed"
            if entry.is_dir() or entry.external_attr != 0:  # of a folder torch reads nothing, in silence
                return f"{entry.filename!r} is no file"
            name = PurePosixPath(entry.filename)
            if (
                name.is_absolute()
                or ".." in name.parts
                or "\\" in entry.filename
                or entry.filename != entry.orig_filename
            ):
                return f"{entry.filename!r} is an unsafe name"
        sizes = {entry.filename.lower(): entry.file_size for entry in entries}  # torch takes data.PKL for data.pkl
        if len(sizes) < len(entries):
            return "two entries of one name"
        if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            return "its entries are larger than the file"
        broken = archive.testzip()
        if broken is not None:
            return f"the checksum of {broken!r} differs"
        records = {name.partition("/")[2]: size for name, size in sizes.items()}
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        flaws = filter(None, (flaw_of_pickle(archive.read(entry), records) for entry in pickles))
        if flaw := next(flaws, None):
            raise NotPlainError(flaw)
        return None


def _words(error: OSError | ValueError) -> str:
    """A reason in one line."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@functools.cache
def environment() -> dict[str, str]:
    """The versions that a checkpoint is written with."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "denoiselab": denoiselab.__version__,
    }


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
