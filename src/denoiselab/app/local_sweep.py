"""A sweep on this machine: its jobs checked, done some at a time, and said in a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from denoiselab.app.compose import Composition
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.folder import command_line, working
from denoiselab.runs.frozen_code import freeze
from denoiselab.runs.launch import launched_from_outside
from denoiselab.runs.local_jobs import Slot, Start, run_jobs, share_out, start_here
from denoiselab.runs.sweep_folder import (
    Job,
    Status,
    Sweep,
    add_jobs,
    make_sweep,
    read_jobs,
    read_sweep,
    sweep_name,
    varying,
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


def check_local(settings: dict[str, Any]) -> None:
    """See to it that the settings of the local launcher are what they can be.

    Raises:
        ConfigError: otherwise.
    """
    for key, annotation in LOCAL_KEYS.items():
        check_value(settings[key], annotation, f"hydra.launcher.{key}")
    check_at_once(settings["jobs"], "hydra.launcher.jobs")
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


def check_nodes(config: dict[str, Any]) -> None:
    """See to it that the processes of this machine are all of a run that no launcher has started.

    Raises:
        ConfigError: otherwise; it would wait for those of other machines.
    """
    nodes = config["trainer"].get("num_nodes", 1)
    if nodes > 1:
        raise ConfigError(f"trainer.num_nodes={nodes}: start it with torchrun on each, or with -m hydra/launcher=slurm")


def as_if_here(config: dict[str, Any]) -> dict[str, Any]:
    """A config that can be checked on a machine without GPUs, such as a login node."""
    return config | {"trainer": config["trainer"] | {"accelerator": "cpu"}}


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
        self.check()
        varies = [varying(some, self.typed) for some in overrides]
        checked = [(self.as_checked(config), choices, some) for config, choices, some in composed]
        check_jobs(varies, checked)
        for config, _, _ in composed:
            self.check_room(config)
        if self.settings["dry_run"]:
            first = 0 if self.sweep is None else len(self.sweep.jobs)
            for number, some in enumerate(varies, first):
                print(f"{number}  {','.join(some) or 'defaults'}")
            return []
        slots = self.slots([config for config, _, _ in composed])
        if self.sweep is None:
            self.begin(composed[0][0]["name"] or sweep_name(varies))
        assert self.sweep is not None
        with working(self.sweep.folder):
            self.sweep, jobs = add_jobs(self.sweep, varies, composed)
            self.do(jobs, slots)
        return jobs

    def do(self, jobs: Sequence[Job], slots: Sequence[Slot], trust: Sequence[str] | None = None) -> None:
        """Do some of its jobs; see `run_jobs`.

        Raises:
            Stopped: after a signal.
        """
        assert self.sweep is not None
        total = len(self.sweep.jobs)
        with resumable(self.sweep):
            run_jobs(self.sweep, jobs, slots, total=total, say=say, trust=trust, start=self.start, logged=last_logged)

    def check(self) -> None:
        """See to it that the settings are what they can be.

        Raises:
            ConfigError: otherwise.
        """
        check_local(self.settings)

    def as_checked(self, config: dict[str, Any]) -> dict[str, Any]:
        """A job's config as this machine can check it."""
        return config

    def check_room(self, config: dict[str, Any]) -> None:
        """See to it that a job fits into what one has here.

        Raises:
            ConfigError: otherwise.
        """
        check_nodes(config)

    def slots(self, configs: Sequence[dict[str, Any]]) -> list[Slot]:
        """The parts of the machine that jobs work in.

        Raises:
            ConfigError: if there is not enough of it.
        """
        return make_slots(self.settings["jobs"], configs)

    @property
    def start(self) -> Start:
        """Begins a job."""
        return start_here

    @property
    def launcher(self) -> dict[str, Any]:
        """What of the settings is needed to go on with the sweep."""
        return {"kind": "local", "jobs": self.settings["jobs"]}

    @property
    def trust(self) -> list[str] | None:
        """As in `job_command`: of a sweep that is gone on with, the configs come from a file."""
        return self.trusted if self.settings["resume"] else None

    def begin(self, name: str, metric: dict[str, str] | None = None) -> Sweep:
        """Make the folder of the sweep, or take the one there is if it is to be gone on with."""
        if self.settings["resume"] and self.settings["folder"] is not None:
            self.sweep = read_sweep(Path(self.settings["folder"]))
            print(f"sweep  {self.sweep.folder}")
            return self.sweep
        code = freeze() if self.settings["freeze"] else None
        self.sweep = begin_sweep(self.settings, self.launcher, name, metric=metric, code=code)
        return self.sweep

    def conclude(self) -> None:
        """Say how all has ended.

        Raises:
            RankError: if a job has not finished.
        """
        if self.sweep is not None:
            conclude(self.sweep)


def begin_sweep(
    settings: dict[str, Any],
    launcher: dict[str, Any],
    name: str,
    *,
    metric: dict[str, str] | None = None,
    code: str | None,
) -> Sweep:
    """Make the folder of a sweep, and say where it is.

    Args:
        settings: of the launcher.
        launcher: what of them is needed to go on with it.
        name: for a folder of its own.
        metric: that stands for a job, with the end that is the better one; None: as the settings say.
        code: the name of the copy of the code.

    Raises:
        ConfigError: if it cannot be made.
    """
    what = {
        "command": command_line(),
        "launcher": launcher,
        "directory": os.getcwd(),
        "metric": metric or (settings["metric"] and {"name": settings["metric"], "mode": "min"}),
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

    named = (gpu.strip() for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    gpus = list(takewhile(lambda gpu: gpu and not gpu.startswith("-"), named))  # CUDA sees none from -1 on
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


def conclude(sweep: Sweep) -> None:
    """The closing table of a sweep.

    Raises:
        RankError: if a job has not finished, unless a search has stopped it.
    """
    print_sweep_of(sweep)
    states = [job.status.state for job in read_jobs(sweep)]
    left = [state for state in states if state not in ("finished", "pruned")]
    if left:
        how = "failed" if set(left) == {"failed"} else f"did not finish ({', '.join(sorted(set(left)))})"
        raise RankError(
            f"{len(left)} of {len(states)} jobs {how}; to do them again: python scripts/sweep.py resume {sweep.folder}"
        )


def print_sweep_of(sweep: Sweep, jobs: Sequence[tuple[Job, Status]] | None = None) -> None:
    """The table of a sweep, on the terminal.

    Args:
        sweep: to show.
        jobs: how they stand; None: as their files say.
    """
    from rich.console import Console

    from denoiselab.reports.sweep_table import print_sweep

    print_sweep(Console(), sweep, [(job, job.status) for job in read_jobs(sweep)] if jobs is None else jobs)


def last_logged(folder: Path, metric: str | None) -> tuple[int | None, float | None]:
    """What a run has come to by what it has logged; see `Logged`."""
    from denoiselab.training.history import METRICS, TRACE, read_rows, series

    try:
        rows = [*read_rows(folder / METRICS), *read_rows(folder / TRACE)]
        values = {} if metric is None else series(folder, metric)
    except ConfigError:  # a damaged file must not hide how a job has ended
        return None, None
    value = values[max(values)] if values else math.nan
    return max((int(row["step"]) for row in rows), default=None), value if math.isfinite(value) else None


@contextmanager
def resumable(sweep: Sweep) -> Iterator[None]:
    """Inside, who stops a sweep is told how to go on."""
    try:
        yield
    except Stopped as stopped:
        message = f"to go on: python scripts/sweep.py resume {sweep.folder}"
        raise Stopped(stopped.number, message) from stopped


def say(line: str) -> None:
    """Show a line at once."""
    print(line, flush=True)


def check_at_once(value: int | str, key: str) -> None:
    """See to it that so many jobs can work at a time.

    Raises:
        ConfigError: otherwise.
    """
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"{key}={value}: must be at least 1, or auto for as many as have GPUs of their own")
