"""The folder of a sweep: one folder for each of its jobs, which is the job's run folder, and files that say how it stands.

    sweeps/<date>_<time>_<name>/
      sweep.json                     what the sweep is: command, how to start its jobs, their folders
      <number>_<what varies>/        the run folder of a job
        job.json                     its composed config: all that a process needs to do the job
        status.json                  how it stands
        job.log                      what it printed

A job's status is written by its own first process as it begins and ends, and by who started it when that process could not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from denoiselab.runs.errors import INTERRUPTED, REQUEUE, ConfigError
from denoiselab.runs.files import read_json, read_small, write_json
from denoiselab.runs.folder import ID, SUMMARY, WORKING, make_run_folder

SWEEP, JOB, STATUS, LOG = "sweep.json", "job.json", "status.json", "job.log"
OF_A_JOB = (JOB, STATUS, LOG, WORKING, ".failed")  # what is in a run folder before the run has begun
LONGEST = 100  # characters of a folder's name

# Of a folder and the name of a number: the step that its run has come to, and the newest value of the number, if it is one.
Logged = Callable[[Path, str | None], tuple[int | None, float | None]]
State = Literal["queued", "running", "finished", "failed", "preempted", "interrupted", "pruned"]
UNFINISHED = ("queued", "running", "failed", "preempted", "interrupted")
OF_EXIT_CODES: dict[int, State] = {  # all others: failed
    0: "finished",
    REQUEUE: "preempted",
    INTERRUPTED: "interrupted",
    -signal.SIGTERM: "preempted",  # before it could answer
    -signal.SIGUSR1: "preempted",
    -signal.SIGUSR2: "preempted",
    -signal.SIGINT: "interrupted",
}


@dataclass(frozen=True)
class Status:
    """How a job stands.

    Args:
        state: "preempted" and "interrupted" jobs were stopped by a signal, "pruned" ones by a search.
        attempts: how often it was started.
        seconds: of the last attempt.
        exit_code: of the last attempt; negative: the signal that killed it.
        error: the first cause of a failure, in one line.
        log: what it printed.
        checkpoint: the newest.
        step: that it has come to.
        metric: the number that stands for it in tables, with its name.
        wandb_id: of its W&B run.
        cluster_job: its number in the batch system, if that started it.
    """

    state: State = "queued"
    attempts: int = 0
    seconds: float | None = None
    exit_code: int | None = None
    error: str | None = None
    log: str = LOG
    checkpoint: str | None = None
    step: int | None = None
    metric: dict[str, Any] | None = None
    wandb_id: str | None = None
    cluster_job: str | None = None


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        folder: of its run.
        number: in the sweep, from 0.
        name: what varies: "objective=v,seed=1".
        varies: the overrides that tell it from the others.
        config: resolved, plain data.
        choices: the choice of each group.
        overrides: of the command line.
    """

    folder: Path
    number: int
    name: str
    varies: list[str]
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]

    @property
    def status(self) -> Status:
        """How it stands."""
        return read_status(self.folder)


@dataclass(frozen=True)
class Sweep:
    """What a sweep is.

    Args:
        folder: of the sweep.
        command: as it was typed.
        launcher: how its jobs are started: plain settings.
        directory: that it was started from, which relative paths in configs begin at.
        metric: that stands for a job in tables, {"name": …, "mode": "min" or "max"}; None: the first that it measures.
        jobs: the names of their folders.
        code: the name of the copy of the code that they run; None: the code as it is when each begins.
    """

    folder: Path
    command: list[str]
    launcher: dict[str, Any]
    directory: str
    metric: dict[str, Any] | None = None
    jobs: list[str] = field(default_factory=list)
    code: str | None = None

    @property
    def metric_name(self) -> str | None:
        """Of the number that stands for a job."""
        name = (self.metric or {}).get("name")
        return name if isinstance(name, str) else None


def varying(overrides: Sequence[str], typed: Sequence[str]) -> list[str]:
    """What tells a job from the others of its sweep: its overrides but for those that were typed for all of them."""
    return [override for override in overrides if override not in typed]


def sweep_name(varies: Sequence[Sequence[str]]) -> str:
    """The keys that vary, for the name of a sweep's folder."""
    return _fit("+".join(dict.fromkeys(_last(override) for some in varies for override in some))) or "sweep"


def _last(override: str) -> str:
    """The last part of an override's key."""
    return override.partition("=")[0].lstrip("+~").rpartition(".")[2]


def _fit(text: str) -> str:
    """As much of a text as the name of a folder can hold, of characters that need no quotes in an override."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).lstrip("_.+-")[: LONGEST - 40]


def make_sweep(root: Path, folder: Path | None, name: str, sweep: dict[str, Any]) -> Sweep:
    """Make the folder of a sweep.

    Args:
        root: where a folder of its own is made.
        folder: that was asked for by name, or None.
        name: for a folder of its own.
        sweep: the arguments of `Sweep`.

    Raises:
        ConfigError: if it cannot be made, or there is a sweep already.
    """
    try:
        if folder is None:
            made = make_run_folder(root, name)
        else:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                there = "holds a sweep already; go on with it: python scripts/sweep.py resume"
                raise ConfigError(f"hydra.launcher.folder={folder}: {there if (folder / SWEEP).exists() else 'exists'}")
            folder.mkdir(parents=True, exist_ok=True)
            made = folder.resolve()
        found = Sweep(folder=made, **sweep)
        write_sweep(found)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error).replace("runs=", "hydra.launcher.root=", 1)) from error
    except OSError as error:
        raise ConfigError(f"hydra.launcher.folder={folder or root}: cannot be written ({error.strerror})") from error
    return found


def write_sweep(sweep: Sweep) -> None:
    """Write sweep.json."""
    told = {key: value for key, value in asdict(sweep).items() if key != "folder"}
    began = read_plain(sweep.folder / SWEEP).get("time") or datetime.now().isoformat(timespec="seconds")
    write_json(sweep.folder / SWEEP, {"name": sweep.folder.name, "time": began} | told)


def read_sweep(folder: Path) -> Sweep:
    """A sweep from its folder.

    Raises:
        ConfigError: if it is none.
    """
    try:
        plain = read_json(folder / SWEEP)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"sweep={folder}: is no sweep (it has no {SWEEP})") from error
    kinds = {
        "command": list,
        "launcher": dict,
        "directory": str,
        "metric": dict | None,
        "jobs": list,
        "code": str | None,
    }
    if not isinstance(plain, dict) or any(not isinstance(plain.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"sweep={folder}: its {SWEEP} is none of ours")
    if any(not isinstance(n, str) or not n or Path(n).name != n or n == ".." for n in plain["jobs"]):
        raise ConfigError(f"sweep={folder}: its {SWEEP} names jobs outside it")
    plain.setdefault("code", None)
    return Sweep(folder=folder.resolve(), **{key: plain[key] for key in kinds})


def add_jobs(
    sweep: Sweep,
    varies: Sequence[list[str]],
    composed: Sequence[tuple[dict[str, Any], dict[str, str], list[str]]],
) -> tuple[Sweep, list[Job]]:
    """Jobs in folders of their own, queued.

    Args:
        sweep: to add them to.
        varies: the overrides that tell each from the others.
        composed: config, choices and overrides of each.

    Raises:
        ConfigError: if they cannot be written.
    """
    jobs = []
    try:
        for number, (some, (config, choices, overrides)) in enumerate(
            zip(varies, composed, strict=True), len(sweep.jobs)
        ):
            name = ",".join(some or overrides) or "defaults"
            short = _fit("+".join(f"{_last(override)}-{override.partition('=')[2]}" for override in some))
            job = Job(sweep.folder / f"{number}_{short or 'run'}", number, name, some, config, choices, overrides)
            job.folder.mkdir()
            write_json(job.folder / JOB, {key: value for key, value in asdict(job).items() if key != "folder"})
            write_status(job.folder, Status())
            jobs.append(job)
        sweep = replace(sweep, jobs=[*sweep.jobs, *(job.folder.name for job in jobs)])
        write_sweep(sweep)
    except OSError as error:
        raise ConfigError(f"sweep={sweep.folder}: cannot be written ({error.strerror or error})") from error
    return sweep, jobs


def read_job(folder: Path) -> Job:
    """A job from its folder.

    Raises:
        ConfigError: if it is none.
    """
    try:
        plain = read_json(folder / JOB)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"job={folder}: has no {JOB}") from error
    kinds = {"number": int, "name": str, "varies": list, "config": dict, "choices": dict, "overrides": list}
    if not isinstance(plain, dict) or any(not isinstance(plain.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"job={folder}: its {JOB} is none of ours")
    return Job(folder=folder.resolve(), **{key: plain[key] for key in kinds})


def read_jobs(sweep: Sweep) -> list[Job]:
    """The jobs of a sweep, in order.

    Raises:
        ConfigError: if one cannot be read.
    """
    for folder in (sweep.folder / name for name in sweep.jobs):
        if folder.is_symlink():
            raise ConfigError(f"sweep={sweep.folder}: {folder.name} is a link")
    return [read_job(sweep.folder / name) for name in sweep.jobs]


def read_status(folder: Path) -> Status:
    """How a job stands; of a file that cannot be read, queued.

    Raises:
        ConfigError: if it is no status.
    """
    try:
        plain = read_json(folder / STATUS)
        status = Status(**plain)
    except FileNotFoundError:
        return Status()
    except TypeError as error:
        raise ConfigError(f"job={folder}: its {STATUS} is none of ours") from error
    if status.state not in get_args(State) or not isinstance(status.attempts, int):
        raise ConfigError(f"job={folder}: its {STATUS} is none of ours")
    return status


def write_status(folder: Path, status: Status) -> None:
    """Write how a job stands."""
    write_json(folder / STATUS, asdict(status))


def ended(
    folder: Path,
    status: Status,
    exit_code: int,
    error: str | None,
    metric: str | None = None,
    logged: tuple[int | None, float | None] = (None, None),
) -> Status:
    """The status of a job that has ended, with what its run folder says; what that does not say stays as it was.

    Args:
        folder: of the job.
        status: before.
        exit_code: of its process; negative: the signal that killed it.
        error: why it failed; None: what its summary says.
        metric: that stands for it; None: the first of its summary.
        logged: see `Logged`; the value is exact, and that of the summary rounded.
    """
    summary, (step, value) = read_plain(folder / SUMMARY), logged
    numbers = {
        key: value
        for group in ("metrics", "losses")
        for key, value in (summary.get(group) or {}).items()
        if isinstance(value, int | float)
    }
    name = metric if metric is not None else next(iter(numbers), None)
    value = numbers.get(name or "") if value is None else value
    before = None if "losses" in summary else status.metric
    saved = (folder / "checkpoints").glob("step_*.ckpt")
    newest = max(saved, key=lambda path: (len(path.name), path.name), default=None)
    wandb_id = status.wandb_id
    with suppress(FileNotFoundError, ConfigError):
        wandb_id = read_small(folder / ID, 1000).decode(errors="replace").strip()
    state = OF_EXIT_CODES.get(exit_code, "failed")
    return replace(
        status,
        state=state,
        exit_code=exit_code,
        error=(error or summary.get("error")) if state == "failed" else None,
        checkpoint=summary.get("checkpoint") or (f"checkpoints/{newest.name}" if newest else status.checkpoint),
        step=next((known for known in (summary.get("steps"), step, status.step) if known is not None), None),
        metric=before if value is None else {"name": name, "value": value},
        wandb_id=wandb_id,
    )


def read_plain(path: Path) -> dict[str, Any]:
    """The plain data of a file; nothing if it cannot be read."""
    try:
        found = read_json(path)
    except (FileNotFoundError, NotADirectoryError, ConfigError):
        return {}
    return found if isinstance(found, dict) else {}


def membership(run_dir: Path) -> tuple[str, str] | None:
    """The name of the sweep that a run is a job of, and the job's own, such as "objective=v,seed=1"; None for a single run."""
    sweep, job = read_plain(run_dir.parent / SWEEP).get("name"), read_plain(run_dir / JOB).get("name")
    return (sweep, job) if isinstance(sweep, str) and isinstance(job, str) and sweep and job else None
