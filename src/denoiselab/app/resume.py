"""Which folder a run works in, and from which checkpoint it goes on.

`run=<folder> resume=auto` goes on from the newest good checkpoint of a folder, or begins there if it is new: a batch job can
be started with the same line again and again. What the run was started with stands in its folder, and need not be typed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.app.compose import config_folder
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import from_json, read_json, read_small
from denoiselab.runs.folder import COMMAND, CONFIG, DATA, LOCK, STARTS, VERSIONS, WRITING
from denoiselab.runs.sweep_folder import OF_A_JOB

OF_THE_COMMAND = ("run", "resume", "allow", "trust")  # what a folder has no say in
LONGEST = 20_000  # characters of an override
_PLAIN = re.compile(r"(\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@:-]*)(=(?P<value>.*))?", re.DOTALL)
_CHOICE = re.compile(r"[\w-]*|\[[\w, -]*\]")
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)
restored: list[str] = []  # the overrides of this command that come from a run folder, not from whoever typed it


def key_of(override: str) -> str:
    """The key of an override such as `+callbacks.x.every=3` or `sampler@other=heun`."""
    return override.partition("=")[0].lstrip("+~")


def restore_overrides(arguments: list[str]) -> list[str]:
    """A command line completed by the overrides that its run was started with, but for those that are typed again.

    Args:
        arguments: of the command line.

    Raises:
        ConfigError: if the folder holds anything but plain overrides.
    """
    restored.clear()
    typed = {key_of(a): a.partition("=")[2].strip("'\"") for a in arguments if "=" in a and not a.startswith("-")}
    resume = typed.get("resume", "none")
    if resume in ("none", "null") or {"-m", "--multirun"} & set(arguments):
        return arguments
    source = Path(typed["run"]) if resume == "auto" and typed.get("run") else Path(resume)
    folder = source
    try:
        folder = source.resolve().parents[1] if source.is_file() else source
        stored = read_json(folder / COMMAND)["overrides"]
    except (FileNotFoundError, NotADirectoryError):
        return arguments
    except (ConfigError, TypeError, KeyError, PermissionError) as error:
        raise ConfigError(f"run={folder}: its {COMMAND} cannot be read") from error
    odd = [stored]
    if isinstance(stored, list):
        stored = [o for o in stored if not isinstance(o, str) or key_of(o) not in typed]
        odd = [o for o in stored if not is_plain(o)]
    if odd:
        raise ConfigError(f"run={folder}: {COMMAND} holds {str(odd[0])[:80]!r}, which is no override of a run")
    restored[:] = [o for o in stored if key_of(o) not in OF_THE_COMMAND]
    return [*restored, *arguments]


def is_plain(override: Any) -> bool:
    """Whether an override can only set a value of the run's config, or choose one of the project's own YAML files.

    Hydra would take a choice such as `../../tmp/x` from anywhere, build what its own keys name before anything is checked, and
    put what `${oc.env:X}` finds in the environment of whoever goes on with the run into its config.
    """
    found = _PLAIN.fullmatch(override) if isinstance(override, str) and len(override) <= LONGEST else None
    if found is None or "hydra" in found["key"] or ".." in found["key"] or _RESOLVER.search(override):
        return False
    group = found["key"].partition("@")[0]
    return not (config_folder() / group).is_dir() or _CHOICE.fullmatch((found["value"] or "").strip("'\"")) is not None


@dataclass(frozen=True)
class Start:
    """Where a run works and begins.

    Args:
        folder: of the run: an existing one to go on in, a new one of that name, or None for one with a name of its own.
        checkpoint: to go on from; None begins at step 0.
        damaged: what is wrong with newer checkpoints, a line each.
    """

    folder: Path | None
    checkpoint: Path | None = None
    damaged: tuple[str, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether the folder already holds a run."""
        return self.folder is not None and (self.folder / CONFIG).is_file()


def find_start(config: dict[str, Any]) -> Start:
    """What `run=` and `resume=` ask for.

    Raises:
        ConfigError: if there is no such checkpoint, it is damaged, or it is not the end of its run.
    """
    from denoiselab.training.checkpoint import FOLDER, newest_valid, verify

    resume, folder = config["resume"], None if config["run"] is None else Path(config["run"])
    try:
        begun = folder is not None and (folder / CONFIG).is_file()
    except PermissionError as error:
        raise ConfigError(f"run={folder}: cannot be read ({error.strerror})") from error
    if folder is not None and not begun and folder.exists() and not _is_free(folder):
        raise ConfigError(f"run={folder}: exists and is no run folder")
    if resume == "none":
        if begun:
            raise ConfigError(f"run={folder}: holds a run already; resume=auto goes on with it")
        return Start(folder)
    if resume == "auto":
        if folder is None:
            raise ConfigError("resume=auto: say of which run, run=<folder>; a folder that is not there is made")
        return Start(folder, *_newest(folder)) if begun else Start(folder)
    path = Path(resume)
    if path.is_dir():
        found, damaged = _newest(path)
        if found is None:
            raise ConfigError(f"resume={path}: has no checkpoint in {FOLDER}/")
        path = found
    else:
        problem, damaged = ("no such file" if not path.is_file() else verify(path)), ()
        if problem:
            raise ConfigError(f"resume={path}: {problem}")
    home = path.parent.parent if path.parent.name == FOLDER and (path.parent.parent / CONFIG).is_file() else None
    if folder is not None and (home is None or folder.resolve() != home.resolve()):
        if begun:
            raise ConfigError(f"run={folder}: holds another run already; give run=<new folder> to branch off into")
        return Start(folder, path, damaged)
    if home is None:
        raise ConfigError(f"resume={path}: lies in no run folder; say where to go on, run=<new folder>")
    newest, _ = newest_valid(home / FOLDER)
    if newest is not None and newest.resolve() != path.resolve():
        raise ConfigError(
            f"resume={path}: the run has gone on to {newest.name} since; resume=auto goes on from there, run=<new folder> "
            "branches off here"
        )
    return Start(home, path, damaged)


def recorded_data(config: dict[str, Any]) -> Any:
    """What the data was of the run that `run=` and `resume=` go on with; None if they do not, or it says nothing.

    Raises:
        ConfigError: if the record cannot be read.
    """
    from denoiselab.training.checkpoint import FOLDER, checkpoints_of

    resume, run = config.get("resume"), config.get("run")
    source = run if resume == "auto" else resume
    if not isinstance(source, str) or source == "none":
        return None
    folder = Path(source).resolve().parents[1] if Path(source).is_file() else Path(source)
    try:
        begun = bool(checkpoints_of(folder / FOLDER))
    except OSError:  # `find_start` says so
        return None
    return read_data(folder) if begun else None


def read_data(folder: Path) -> Any:
    """What the data of a run was; None if its folder says nothing.

    Raises:
        ConfigError: if the record cannot be read.
    """
    try:
        return from_json(read_small(folder / DATA))
    except FileNotFoundError:
        return None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"run={folder}: its {DATA} cannot be read ({error})") from error


def _is_free(folder: Path) -> bool:
    """Whether a folder without a config is empty, but for what a start leaves that was killed before it wrote one."""
    left = (LOCK, WRITING, COMMAND, DATA, VERSIONS, *OF_A_JOB)
    return folder.is_dir() and all(p.name in left or p.name.endswith(".partial") for p in folder.iterdir())


def _newest(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest good checkpoint of a run, and what is wrong with newer ones.

    Raises:
        ConfigError: if there are some and none is good, or there must have been some: to start over would lose the run without
            a word.
    """
    from denoiselab.training.checkpoint import FOLDER, newest_valid

    try:
        found, damaged = newest_valid(folder / FOLDER)
    except OSError as error:
        raise ConfigError(f"run={folder}: {FOLDER}/ cannot be read ({error.strerror})") from error
    if found is None and damaged:
        raise ConfigError(f"run={folder}: none of its checkpoints is whole: {'; '.join(damaged)}")
    if found is None and (step := _saved_before(folder)):
        raise ConfigError(
            f"run={folder}: has gone as far as step {step}, and there is no checkpoint in {FOLDER}/; put them back, or begin "
            "in a new folder"
        )
    return found, tuple(damaged)


def _saved_before(folder: Path) -> int:
    """The step that a run has come to if it must have saved a checkpoint by then; else 0.

    So it is if it went on from one, if there is a best, and if it has gone on after a save: one that writes beside training
    has written when the next one has begun.
    """
    from denoiselab.training.checkpoint import FOLDER
    from denoiselab.training.history import TRACE, read_rows
    from denoiselab.training.saving import BEST_NOTE

    last = max((int(row["step"]) for row in read_rows(folder / TRACE)), default=0)
    try:
        starts = [from_json(line)["step"] for line in read_small(folder / STARTS).splitlines()]
        callbacks = read_json(folder / CONFIG)["callbacks"].values()
        savers = [c for c in callbacks if c and c["_target_"].endswith(".Checkpoints")]
        saved = any(starts) or (folder / FOLDER / BEST_NOTE).exists()
        saved = saved or any(last > (2 if c.get("asynchronous") else 1) * c["every"] for c in savers)
        return max(last, *starts, 1) if saved else 0
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError, KeyError, AttributeError):  # what is not as we write it
        return last
