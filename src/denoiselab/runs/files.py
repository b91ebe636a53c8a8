"""Files of a run: written whole and on disk or not at all, and read with bounds, since they may be somebody else's."""

from __future__ import annotations

import errno
import json
import os
import stat
import uuid
from pathlib import Path
from typing import IO, Any

from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.secrets import redact

MOST_BYTES, MOST_JSON_BYTES, MOST_DEPTH = 1 << 30, 1 << 26, 100  # of what is read of a run, far above what one writes


def make_durably(folder: Path) -> None:
    """Make a folder and those above it, if they are not there, so that a power cut does not take them away.

    Raises:
        OSError: if that fails.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_folder(folder: Path) -> None:
    """Make a folder that is about to be written to, with those above it.

    Raises:
        ValueError: if that cannot be, before any work is lost.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to")


def write_json(path: Path, value: Any) -> None:
    """Write plain data, without secrets, complete or not at all."""
    plain = json.loads(json.dumps(value, default=str))
    write_text(path, json.dumps(redact(plain), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all: on disk before it takes its name, and under that when this returns."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # of this write alone
    try:
        with beside.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_own(folder: Path, *parts: str) -> None:
    """See to it that what is written into a run folder, which may be somebody else's, stays there; it may be a link itself.

    Args:
        folder: of a run.
        parts: names of the subfolders that will be written to; none: the whole folder.

    Raises:
        ConfigError: if a link in it leads out of it.
    """
    home = os.path.realpath(folder)
    for top in [folder / part for part in parts] or [folder]:
        below = (Path(root, name) for root, folders, files in os.walk(top) for name in (*folders, *files))
        for path in (*([top] if parts else []), *below):
            name = path.relative_to(folder)
            if "wandb" in name.parts[:-1]:  # which links to its caches, and makes each of its files anew
                continue
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise ConfigError(f"run={folder}: {show(name)} is a link that leads out of the run folder")


def open_own(path: Path, mode: str, buffering: int = -1) -> IO[Any]:
    """Open a file of a run to write to it, which is made if it is not there; see `check_own`.

    Raises:
        OSError: if it is a link, a pipe or a device, or cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        if os.path.islink(name):
            raise OSError(errno.ELOOP, "is a link", name)
        return _open_regular(name, flags | os.O_NOFOLLOW)

    return open(path, mode, buffering, opener=opener)


def _open_regular(name: str, flags: int) -> int:
    """A descriptor of a file; without waiting, as one does for the other end of a pipe."""
    descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", name)
    return descriptor


def read_small(path: Path, limit: int = MOST_BYTES) -> bytes:
    """The content of a file of a run, which may be somebody else's: of a pipe or a device there might be no end.

    Args:
        path: of the file.
        limit: bytes that it may have.

    Raises:
        FileNotFoundError: if there is none.
        ConfigError: if it cannot be read, is no regular file, or is larger.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {limit:,}")
            return file.read(size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """The plain data in a file of a run; see `read_small` and `from_json`.

    Raises:
        FileNotFoundError: if there is none.
        ConfigError: if it cannot be read, or is no JSON.
    """
    content = read_small(path, MOST_JSON_BYTES)
    try:
        return from_json(content)
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def from_json(text: str | bytes) -> Any:
    """Plain data that is nested no deeper than any function that walks through it can go.

    Raises:
        ValueError: if it is no JSON, or nested more than `MOST_DEPTH` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    layer = [value]
    for _ in range(MOST_DEPTH + 1):
        nodes = [node.values() if isinstance(node, dict) else node for node in layer if isinstance(node, dict | list)]
        if not nodes:
            return value
        layer = [item for node in nodes for item in node]
    raise ValueError("is nested too deeply")
