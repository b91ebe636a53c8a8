"""Run folders: one per training job, made atomically, holding all that is needed to know what ran."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.secrets import redact

CONFIG, COMMAND, VERSIONS, SUMMARY = "config.json", "command.json", "versions.json", "summary.json"
ID = "id"  # of the run, in W&B for example: kept, so that a resumed run is the same one
LOCK, WRITING = ".lock", ".writing"  # held by the process that was started, and by that of rank 0
RUNNING = {"status": "running"}  # the summary of a run that has not ended
STARTS = "starts.jsonl"  # a line for each time that a run was started or resumed
PACKAGES = (
    "denoiselab",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "omegaconf",
    "wandb",
    "torchmetrics",
    "torch-fidelity",
    "numpy",
)
log = logging.getLogger(__name__)


def make_run_folder(root: Path, name: str, now: datetime | None = None) -> Path:
    """Make a folder of its own for a run: <root>/<date>_<time>_<name>, with -2, -3 … if that is taken.

    `mkdir` decides between two launches in the same second, so they never share one.

    Raises:
        ValueError: if the name cannot be part of a folder's name, or the root is not writable.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,99}", name):
        raise ValueError(f"name={name}: must be 1 to 100 letters, digits or _.,=+- and begin with a letter or digit")
    stem = f"{(now or datetime.now()):%Y-%m-%d_%H-%M-%S}_{name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = root / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
                return folder.resolve()
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ValueError(f"runs={root}: cannot make a folder there ({error.strerror})") from error


def make_folder(folder: Path) -> Path:
    """Make the folder that a run was given by name.

    Raises:
        ValueError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run={folder}: cannot be made ({error.strerror})") from error
    return folder.resolve()


def run_id(folder: Path) -> str:
    """The id of a run, made when it is first asked for: folders of one name, elsewhere, are other runs."""
    if not (folder / ID).exists():
        write_text(folder / ID, f"{folder.name[:80]}-{uuid.uuid4().hex[:8]}\n")
    return (folder / ID).read_text().strip()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process can hold the folder: two that train one run would write over each other.

    The lock is the process's own: it ends with it, however that may be, and processes that it has started do not share it.
    Of these the one that writes has one too, for it may outlive a launcher that was killed.

    Raises:
        ConfigError: if another process holds it, or writes in it.
    """
    with _locked(folder, LOCK):
        with writing(folder):
            pass
        yield


def writing(folder: Path) -> AbstractContextManager[None]:
    """Inside, this process is the one that writes in the folder; see `held`."""
    return _locked(folder, WRITING)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    try:
        opened = (folder / name).open("a+")
    except OSError as error:
        raise ConfigError(f"run={folder}: cannot be written to ({error.strerror})") from error
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigError(f"run={folder}: is being trained by {file.read().strip() or 'another process'}") from None
        except OSError as error:  # some file systems of clusters know no locks
            log.warning("run=%s: cannot be locked (%s); let no other process train it", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def newest_run(root: Path) -> Path:
    """The run that was started or resumed last: each start writes its config.

    Raises:
        ValueError: if there is none.
    """

    def order(config: Path) -> tuple[int, list[int]]:
        """Among those of one moment, as coarse file systems have them, the tenth comes after the ninth."""
        return config.stat().st_mtime_ns, [int(number) for number in re.findall(r"\d+", config.parent.name)]

    configs = sorted(root.glob(f"*/{CONFIG}"), key=order)
    if not configs:
        raise ValueError(f"run=null: there is no run in {root}; train one, or give run=<folder>")
    return configs[-1].parent.resolve()


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
    """Write a file, complete or not at all: on disk before it takes its name."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def versions() -> dict[str, Any]:
    """What ran: Python, packages, machine and the state of the source tree."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": installed,
        "git": git_state(Path(__file__).parent),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and changed files of the checkout that holds `folder`; None outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if "site-packages" in folder.parts:
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed_files": git("status", "--porcelain").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    """The command as it was typed, the program by its name alone."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
