"""Sweeps: what a launcher does with the jobs that Hydra has composed, and `denoiselab-sweep` for what becomes of them."""

from __future__ import annotations

import csv
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from denoiselab.app.compose import Composition
from denoiselab.app.resume import is_plain
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.folder import command_line, held
from denoiselab.runs.frozen_code import freeze
from denoiselab.runs.launch import launched_from_outside
from denoiselab.runs.local_jobs import Slot, run_jobs, share_out
from denoiselab.runs.sweep_folder import (
    UNFINISHED,
    Job,
    Status,
    Sweep,
    add_jobs,
    ended,
    make_sweep,
    read_jobs,
    read_sweep,
    sweep_name,
    varying,
    write_status,
    write_sweep,
)

PATIENCE = 60.0  # seconds for the jobs of a sweep that was killed to save and end
RESULTS, STUDY = "results.csv", "study.db"
OF_A_SEARCH = re.compile(
    r"hydra/sweeper=optuna|hydra\.launcher\.(jobs|metric|root|folder)=[^$]*"
    r"|hydra\.sweeper\.(metric|mode|trials|seed|sampler|startup|pruner|warmup)=[\w./-]*"
)
LOCAL_KEYS: dict[str, Any] = {
    "folder": str | None,
    "root": str,
    "jobs": int | str,
    "metric": str | None,
    "resume": bool,
    "freeze": bool,
    "dry_run": bool,
}
SWEEP_KEYS: dict[str, Any] = {
    "action": str | None,
    "folder": str | None,
    "jobs": int | str | None,
    "failed": bool,
    "code": str,
    "trust": list[str],
}


def check_local(settings: dict[str, Any]) -> None:
    """See to it that the settings of the local launcher are what they can be.

    Raises:
        ConfigError: otherwise.
    """
    for key, annotation in LOCAL_KEYS.items():
        check_value(settings[key], annotation, f"hydra.launcher.{key}")
    _check_at_once(settings["jobs"], "hydra.launcher.jobs")
    if launched_from_outside() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError("-m: a sweep starts the processes of its jobs itself; start it once, without torchrun")


def check_jobs(varies: Sequence[Sequence[str]], composed: Sequence[Composition]) -> None:
    """See to it that each job can begin, before any does.

    Args:
        varies: what tells each job from the others.
        composed: what they are.

    Raises:
        ConfigError: for the first that cannot; it says which, and how many there are.
    """
    refused: dict[str, str] = {}
    for some, (config, _, _) in zip(varies, composed, strict=True):
        try:
            check_job(config)
        except ConfigError as error:
            refused[",".join(some)] = str(error)
    if refused:
        name, reason = next(iter(refused.items()))
        others = f"; {len(refused)} of {len(composed)} jobs are refused" if len(composed) > 1 else ""
        raise ConfigError(f"{reason} (job {name}{others})" if len(composed) > 1 else reason)


def check_job(config: dict[str, Any]) -> None:
    """See to it that a job can begin.

    Raises:
        ConfigError: otherwise.
    """
    from denoiselab.app.train import check_run

    for key in ("run", "resume"):
        if config.get(key) not in (None, "none"):
            raise ConfigError(
                f"{key}={config[key]}: the jobs of a sweep have folders of their own; hydra.launcher.folder names theirs, "
                "and python scripts/sweep.py resume <folder> goes on with a sweep"
            )
    check_run(config)


@dataclass
class LocalSweep:
    """A sweep on this machine, as its launcher is called once or several times.

    Args:
        settings: of the launcher.
        typed: overrides of the command line.
        trusted: packages, beside ours, whose classes a config from a file may name.
        sweep: once it has begun.
    """

    settings: dict[str, Any]
    typed: list[str]
    trusted: list[str]
    sweep: Sweep | None = None

    def launch(self, overrides: Sequence[Sequence[str]], composed: Sequence[Composition]) -> list[Job]:
        """Check the jobs, do them, and say how they have ended.

        Args:
            overrides: of each.
            composed: config, choices and overrides of each.

        Raises:
            ConfigError: if one is refused; then none has begun.
            Stopped: after a signal.
        """
        check_local(self.settings)
        varies = [varying(some, self.typed) for some in overrides]
        check_jobs(varies, composed)
        if self.settings["dry_run"]:
            first = 0 if self.sweep is None else len(self.sweep.jobs)
            for number, some in enumerate(varies, first):
                print(f"{number}  {','.join(some) or 'defaults'}")
            return []
        slots = make_slots(self.settings["jobs"], [config for config, _, _ in composed])
        if self.sweep is None:
            self.begin(composed[0][0]["name"] or sweep_name(varies))
        assert self.sweep is not None
        self.sweep, jobs = add_jobs(self.sweep, varies, composed)
        with resumable(self.sweep):
            run_jobs(self.sweep, jobs, slots, total=len(self.sweep.jobs), say=say)
        return jobs

    @property
    def trust(self) -> list[str] | None:
        """As in `job_command`: of a sweep that is gone on with, the configs come from a file."""
        return self.trusted if self.settings["resume"] else None

    def begin(self, name: str, metric: str | None = None) -> Sweep:
        """Make the folder of the sweep, or take the one there is if it is to be gone on with."""
        if self.settings["resume"] and self.settings["folder"] is not None:
            self.sweep = read_sweep(Path(self.settings["folder"]))
            print(f"sweep  {self.sweep.folder}")
            return self.sweep
        launcher = {"kind": "local", "jobs": self.settings["jobs"]}
        code = freeze() if self.settings["freeze"] else None
        self.sweep = begin_sweep(self.settings, launcher, name, metric=metric, code=code)
        return self.sweep

    def conclude(self) -> None:
        """Say how all has ended.

        Raises:
            RankError: if a job has failed.
        """
        if self.sweep is not None:
            conclude(self.sweep)


def begin_sweep(
    settings: dict[str, Any], launcher: dict[str, Any], name: str, *, metric: str | None = None, code: str | None
) -> Sweep:
    """Make the folder of a sweep, and say where it is.

    Args:
        settings: of the launcher.
        launcher: what of them is needed to go on with it.
        name: for a folder of its own.
        metric: that stands for a job, if the settings do not say.
        code: the name of the copy of the code.

    Raises:
        ConfigError: if it cannot be made.
    """
    what = {
        "command": command_line(),
        "launcher": launcher,
        "directory": os.getcwd(),
        "metric": settings["metric"] or metric,
        "code": code,
    }
    folder = None if settings["folder"] is None else Path(settings["folder"])
    sweep = make_sweep(Path(settings["root"]), folder, name, what)
    print(f"sweep  {sweep.folder}")
    return sweep


def make_slots(at_once: int | str, configs: Sequence[dict[str, Any]]) -> list[Slot]:
    """The parts of this machine that jobs work in.

    Args:
        at_once: jobs that work at a time; "auto": as many as have GPUs of their own, or one.
        configs: of the jobs.

    Raises:
        ConfigError: if there are not enough GPUs for that.
    """
    import torch

    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = gpus or [str(index) for index in range(torch.cuda.device_count())]
    wanted = [
        config["trainer"]["devices"]
        for config in configs
        if gpus and config["trainer"].get("accelerator") in ("gpu", "auto")
    ]
    most = max((devices for devices in wanted if isinstance(devices, int)), default=1)
    count = int(at_once) if at_once != "auto" else max(1, len(gpus) // most) if wanted else 1
    if wanted and count * most > len(gpus):
        raise ConfigError(
            f"hydra.launcher.jobs={count}: so many jobs with trainer.devices={most} need {count * most} GPUs, and there "
            f"are {len(gpus)}"
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return share_out(count, cores, gpus if wanted else [])


def sweep(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """`resume`, `status` or `collect` a sweep.

    Raises:
        ConfigError: if an option is wrong, or the folder holds no sweep.
        RankError: if a job has failed.
        Stopped: after a signal.
    """
    for key, annotation in SWEEP_KEYS.items():
        check_value(options[key], annotation, key)
    if options["code"] not in ("then", "now"):
        raise ConfigError(f"code={options['code']}: must be then, as the sweep was begun with, or now")
    actions = {"resume": _resume, "status": _status, "collect": _collect}
    if options["action"] not in actions or options["folder"] is None:
        raise ConfigError("sweep: say what to do and with which: sweep.py resume|status|collect <folder of a sweep>")
    actions[options["action"]](read_sweep(_one(options["folder"])), options)


def _one(given: str) -> Path:
    """The folder that is meant by a path or a pattern.

    Raises:
        ConfigError: if a pattern means several.
    """
    found = [Path(given)] if Path(given).exists() else [Path(path) for path in glob(given)]
    if len(found) > 1:
        raise ConfigError(f"folder={given}: must be one sweep, not {len(found)}")
    return found[0] if found else Path(given)


def _resume(sweep: Sweep, options: dict[str, Any]) -> None:
    """Do what is unfinished, in the same folders; a search goes on to its last trial."""
    if (sweep.folder / STUDY).exists():
        resume_search(sweep, options)
        return
    if options["jobs"] is not None:
        _check_at_once(options["jobs"], "jobs")
    at_once = options["jobs"] or sweep.launcher.get("jobs", 1)
    todo = [job for job in read_jobs(sweep) if job.status.state in UNFINISHED]
    if not options["failed"]:
        todo = [job for job in todo if job.status.state != "failed"]
    print(f"sweep  {sweep.folder}\n{len(todo)} of {len(sweep.jobs)} jobs to do")
    if options["code"] == "now" and todo:
        sweep = replace(sweep, code=freeze())
        write_sweep(sweep)
    if sweep.launcher.get("kind") == "slurm":
        from denoiselab.app.cluster import resume_submitted

        resume_submitted(sweep, todo)
        return
    if not os.path.isdir(sweep.directory):
        raise ConfigError(f"sweep={sweep.folder}: was started from {sweep.directory}, which is not there")
    with resumable(sweep):
        for job in todo:
            wait_for(job)
        slots = make_slots(at_once, [job.config for job in todo])
        run_jobs(sweep, todo, slots, total=len(sweep.jobs), say=say, trust=options["trust"])
    conclude(sweep)


def resume_search(sweep: Sweep, options: dict[str, Any]) -> None:
    """Go on with a search by the command that it was begun with.

    Raises:
        ConfigError: if its folder holds another command than one that searches.
    """
    from denoiselab.app import train_command

    words = sweep.command[1:]
    odd = [w for w in words if not (isinstance(w, str) and _is_of_a_search(w))]
    if odd or not words:
        raise ConfigError(f"sweep={sweep.folder}: its command holds {str(odd)[:80]}, which is no override of a search")
    kept = [w for w in words if w.partition("=")[0] not in ("trust", "hydra.launcher.folder", "hydra.launcher.root")]
    folder = str(sweep.folder).replace("'", r"\'")
    jobs = [] if options["jobs"] is None else [f"hydra.launcher.jobs={options['jobs']}"]
    trust = f"trust=[{','.join(options['trust'])}]"
    os.chdir(sweep.directory)
    sys.argv[1:] = [*kept, *jobs, trust, f"hydra.launcher.folder='{folder}'", "hydra.launcher.resume=true"]
    train_command()


def _is_of_a_search(word: str) -> bool:
    """Whether a word of a command line can only set or search values of a run's config, or be about the search itself."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep
    from hydra.errors import HydraException

    if word in ("-m", "--multirun") or OF_A_SEARCH.fullmatch(word):
        return True
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    if not override.is_sweep_override():
        return is_plain(word)
    key, interval = override.get_key_element(), isinstance(override.value(), IntervalSweep)
    values = ["0"] if interval else override.sweep_string_iterator()
    return all(is_plain(f"{key}={value}") for value in values)


def wait_for(job: Job) -> None:
    """Wait until the processes of a sweep that was killed have saved.

    Raises:
        ConfigError: if they go on.
    """
    began = time.monotonic()
    while True:
        try:
            with held(job.folder):
                return
        except ConfigError:
            if time.monotonic() - began > PATIENCE:
                raise
            time.sleep(0.5)


def look(job: Job, metric: str | None, queue: Mapping[str, str]) -> Status:
    """How a job stands; one that was killed without a word has failed.

    Args:
        job: to look at.
        metric: that stands for it.
        queue: what a batch system says of its tasks.
    """
    status = job.status
    if status.cluster_job is not None and status.state in ("queued", "running", "preempted"):
        said = queue.get(status.cluster_job, "gone from the queue")
        if said in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
            return replace(status, state="running" if said == "RUNNING" else "queued")
        if status.state == "preempted" or said == "CANCELLED":
            return replace(status, state="interrupted" if said == "CANCELLED" else "preempted", error=None)
        return ended(job.folder, status, 1, f"ended without a word (Slurm: {said})", metric)
    if status.state != "running":
        return status
    try:
        with held(job.folder):
            return ended(job.folder, status, 1, "ended without a word (killed?)", metric)
    except ConfigError:
        return status


def look_at_all(sweep: Sweep) -> list[tuple[Job, Status]]:
    """How all jobs stand."""
    from denoiselab.runs.slurm import in_queue

    jobs = read_jobs(sweep)
    queue = in_queue([task for job in jobs if (task := job.status.cluster_job)])
    return [(job, look(job, sweep.metric, queue)) for job in jobs]


def _status(sweep: Sweep, options: dict[str, Any]) -> None:
    for job, status in look_at_all(sweep):
        if status != job.status:
            write_status(job.folder, status)
    print_sweep_of(sweep)


def _collect(sweep: Sweep, options: dict[str, Any]) -> None:
    """Write a table of all jobs: what varies, how each stands, and every number of its summary."""
    from denoiselab.reports.sweep_table import rows

    table = rows(sweep, look_at_all(sweep))
    columns = list(dict.fromkeys(key for row in table for key in row))
    with (sweep.folder / RESULTS).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    print_sweep_of(sweep)
    print(f"written to {sweep.folder / RESULTS}")


def conclude(sweep: Sweep) -> None:
    """The closing table of a sweep.

    Raises:
        RankError: if a job has failed.
    """
    print_sweep_of(sweep)
    states = [job.status.state for job in read_jobs(sweep)]
    failed = states.count("failed")
    if failed:
        raise RankError(
            f"{failed} of {len(states)} jobs failed; to do them again: python scripts/sweep.py resume {sweep.folder}"
        )


def print_sweep_of(sweep: Sweep) -> None:
    """The table of a sweep, on the terminal."""
    from rich.console import Console

    from denoiselab.reports.sweep_table import print_sweep

    print_sweep(Console(), sweep, [(job, job.status) for job in read_jobs(sweep)])


def _check_at_once(value: int | str, key: str) -> None:
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"{key}={value}: must be at least 1, or auto for as many as have GPUs of their own")


def say(line: str) -> None:
    """Show a line at once."""
    print(line, flush=True)


@contextmanager
def resumable(sweep: Sweep) -> Iterator[None]:
    """Inside, who stops a sweep is told how to go on."""
    try:
        yield
    except Stopped as stopped:
        message = f"to go on: python scripts/sweep.py resume {sweep.folder}"
        raise Stopped(stopped.number, message) from stopped
