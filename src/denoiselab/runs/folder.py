"""Run folders: one per training job, made atomically, holding all that is needed to know what ran."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import make_durably, open_own, read_small, sync_folder, write_text

CONFIG, COMMAND, VERSIONS, SUMMARY = "config.json", "command.json", "versions.json", "summary.json"
DATA = "data.json"  # which files a set is made of, where single ones may break
ID = "id"  # of the run, in W&B for example: kept, so that a resumed run is the same one
LOCK, WRITING = ".lock", ".writing"  # held by the process that was started, and by that of rank 0
SENDING = ".sending"  # held by the process that sends the run to W&B
WORKING = ".working"  # held by the process that works on a sweep, or on a job of one from its first line
GIT = "_git.json"  # in a copy of the package: the state of the checkout that it was made of
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
SOURCES = (":/*.py", ":/*.yaml")  # of a checkout: what makes a run come out otherwise
MOST_SOURCES, MOST_SOURCE_BYTES = 1000, 1 << 24
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
        make_durably(root)
        number = 1
        while True:
            folder = root / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
                sync_folder(root)
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
        make_durably(folder)
    except OSError as error:
        raise ValueError(f"run={folder}: cannot be made ({error.strerror})") from error
    return folder.resolve()


def run_id(folder: Path) -> str:
    """The id of a run, made when it is first asked for: folders of one name, elsewhere, are other runs."""
    if not (folder / ID).exists():
        write_text(folder / ID, f"{folder.name[:80]}-{uuid.uuid4().hex[:8]}\n")
    return read_small(folder / ID, 1000).decode(errors="replace").strip()


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


def sending(folder: Path) -> AbstractContextManager[None]:
    """Inside, this process is the one that sends the run to W&B; see `held`."""
    return _locked(folder, SENDING, "sent to W&B")


def working(folder: Path) -> AbstractContextManager[None]:
    """Inside, this process is the one that works on a sweep, or on a job of one; see `held`."""
    return _locked(folder, WORKING, "worked on", patience=2.0)


def is_worked_on(folder: Path) -> bool:
    """Whether another process works on a sweep or a job; also where that cannot be known."""
    try:
        with open_own(folder / WORKING, "r") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment, for which `working` waits
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


@contextmanager
def _locked(folder: Path, name: str, doing: str = "trained", patience: float = 0.0) -> Iterator[None]:
    try:
        opened = open_own(folder / name, "a+")
    except OSError as error:
        raise ConfigError(f"run={folder}: {name} cannot be written to ({error.strerror})") from error
    with opened as file:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                file.seek(0)
                who = show(file.read(1000).strip()) or "another process"
                raise ConfigError(f"run={folder}: is being {doing} by {who}") from None
            except OSError as error:  # some file systems of clusters know no locks
                log.warning("run=%s: cannot be locked (%s); let no other process train it", folder, error.strerror)
                break
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


def cache_folder() -> Path:
    """Where what can be made again is kept: DENOISELAB_CACHE, or ~/.cache/denoiselab."""
    return Path(os.environ.get("DENOISELAB_CACHE") or Path.home() / ".cache" / "denoiselab")


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and changed files of the checkout that holds `folder`, or that it is a copy of; None outside one.

    `changes_sha256` is of the names and contents of the `SOURCES` that are not as committed; None if there are none.
    """
    if copied := next((f for p in (folder, *folder.parents) if (f := p / GIT).is_file()), None):
        return json.loads(copied.read_text())

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, check=True, timeout=20)
        return os.fsdecode(done.stdout).strip()

    try:
        if "site-packages" in folder.parts:
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed_files": git("status", "--porcelain").splitlines(),
            "changes_sha256": _changes(Path(git("rev-parse", "--show-toplevel")), git),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _changes(top: Path, git: Callable[..., str]) -> str | None:
    changed = git("diff", "HEAD", "--name-only", "--no-renames", "-z", "--", *SOURCES)
    new = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", "--", *SOURCES)
    names = sorted({name for name in (changed + new).split("\0") if name})
    digest = hashlib.sha256()
    for name in names[:MOST_SOURCES]:
        path = top / name
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= MOST_SOURCE_BYTES else b""
        digest.update(os.fsencode(name) + f"\0{path.is_file()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest() if names else None


def command_line() -> list[str]:
    """The command as it was typed, the program by its name alone."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
