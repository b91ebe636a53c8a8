"""Sweeps: what a launcher does with the jobs that Hydra has composed, and `denoiselab-sweep` for what becomes of them."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.app.compose import Composition
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.folder import command_line, held
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
)

PATIENCE = 60.0  # seconds for the jobs of a sweep that was killed to save and end
RESULTS = "results.csv"
LOCAL_KEYS: dict[str, Any] = {
    "folder": str | None,
    "root": str,
    "jobs": int | str,
    "metric": str | None,
    "dry_run": bool,
}
SWEEP_KEYS: dict[str, Any] = {
    "action": str | None,
    "sweep": str | None,
    "jobs": int | str | None,
    "failed": bool,
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


def check_jobs(
    varies: Sequence[Sequence[str]], composed: Sequence[Composition], check: Callable[[dict[str, Any]], Any]
) -> None:
    """See to it that each job can begin, before any does.

    Args:
        varies: what tells each job from the others.
        composed: what they are.
        check: raises if a config is refused.

    Raises:
        ConfigError: for the first that cannot; it says which, and how many there are.
    """
    refused: dict[str, str] = {}
    for some, (config, _, _) in zip(varies, composed, strict=True):
        for key in ("run", "resume"):
            if config.get(key) not in (None, "none"):
                raise ConfigError(
                    f"{key}={config[key]}: the jobs of a sweep have folders of their own; hydra.launcher.folder names theirs, "
                    "and python scripts/sweep.py resume <folder> goes on with a sweep"
                )
        try:
            check(config)
        except ConfigError as error:
            refused[",".join(some)] = str(error)
    if refused:
        name, reason = next(iter(refused.items()))
        others = f"; {len(refused)} of {len(composed)} jobs are refused" if len(composed) > 1 else ""
        raise ConfigError(f"{reason} (job {name}{others})" if len(composed) > 1 else reason)


@dataclass
class LocalSweep:
    """A sweep on this machine, as its launcher is called once or several times.

    Args:
        settings: of the launcher.
        typed: overrides of the command line.
        sweep: once it has begun.
    """

    settings: dict[str, Any]
    typed: list[str]
    sweep: Sweep | None = None

    def launch(
        self,
        overrides: Sequence[Sequence[str]],
        composed: Sequence[Composition],
        prune: Callable[[Job], bool] | None = None,
    ) -> list[Job]:
        """Check the jobs, do them, and say how they have ended.

        Args:
            overrides: of each.
            composed: config, choices and overrides of each.
            prune: as in `run_jobs`.

        Raises:
            ConfigError: if one is refused; then none has begun.
            Stopped: after a signal.
        """
        from denoiselab.app.train import check_run

        check_local(self.settings)
        varies = [varying(some, self.typed) for some in overrides]
        check_jobs(varies, composed, check_run)
        if self.settings["dry_run"]:
            first = 0 if self.sweep is None else len(self.sweep.jobs)
            for number, some in enumerate(varies, first):
                print(f"{number}  {','.join(some) or 'defaults'}")
            return []
        slots = make_slots(self.settings["jobs"], [config for config, _, _ in composed])
        if self.sweep is None:
            self.sweep = self._begin(composed[0][0], varies)
        self.sweep, jobs = add_jobs(self.sweep, varies, composed)
        with _resumable(self.sweep):
            run_jobs(self.sweep, jobs, slots, say=_say, prune=prune)
        return jobs

    def _begin(self, config: dict[str, Any], varies: Sequence[Sequence[str]]) -> Sweep:
        folder, name = self.settings["folder"], config["name"] or sweep_name(varies)
        what = {
            "command": command_line(),
            "launcher": {"kind": "local", "jobs": self.settings["jobs"]},
            "directory": os.getcwd(),
            "metric": self.settings["metric"],
        }
        sweep = make_sweep(Path(self.settings["root"]), None if folder is None else Path(folder), name, what)
        print(f"sweep  {sweep.folder}")
        return sweep

    def conclude(self) -> None:
        """Say how all has ended.

        Raises:
            RankError: if a job has failed.
        """
        if self.sweep is not None:
            conclude(self.sweep)


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


def sweep_command(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """`resume`, `status` or `collect` a sweep.

    Raises:
        ConfigError: if an option is wrong, or the folder holds no sweep.
        RankError: if a job has failed.
        Stopped: after a signal.
    """
    for key, annotation in SWEEP_KEYS.items():
        check_value(options[key], annotation, key)
    actions = {"resume": _resume, "status": _status, "collect": _collect}
    if options["action"] not in actions or options["sweep"] is None:
        raise ConfigError("sweep: say what to do and with which: sweep.py resume|status|collect <folder of a sweep>")
    actions[options["action"]](read_sweep(Path(options["sweep"])), options)


def _resume(sweep: Sweep, options: dict[str, Any]) -> None:
    """Do what is unfinished, in the same folders."""
    if options["jobs"] is not None:
        _check_at_once(options["jobs"], "jobs")
    at_once = options["jobs"] or sweep.launcher.get("jobs", 1)
    todo = [job for job in read_jobs(sweep) if job.status.state in UNFINISHED]
    if not options["failed"]:
        todo = [job for job in todo if job.status.state != "failed"]
    print(f"sweep  {sweep.folder}\n{len(todo)} of {len(sweep.jobs)} jobs to do")
    if not os.path.isdir(sweep.directory):
        raise ConfigError(f"sweep={sweep.folder}: was started from {sweep.directory}, which is not there")
    with _resumable(sweep):
        for job in todo:
            _wait_for(job)
        run_jobs(sweep, todo, make_slots(at_once, [job.config for job in todo]), say=_say, trust=options["trust"])
    conclude(sweep)


def _wait_for(job: Job) -> None:
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


def look(job: Job, metric: str | None) -> Status:
    """How a job stands; one that was killed without a word has failed."""
    status = job.status
    if status.state != "running":
        return status
    try:
        with held(job.folder):
            return ended(job.folder, status, 1, "ended without a word (killed?)", metric)
    except ConfigError:
        return status


def _status(sweep: Sweep, options: dict[str, Any]) -> None:
    for job in read_jobs(sweep):
        status = look(job, sweep.metric)
        if status != job.status:
            write_status(job.folder, status)
    _print(sweep)


def _collect(sweep: Sweep, options: dict[str, Any]) -> None:
    """Write a table of all jobs: what varies, how each stands, and every number of its summary."""
    from denoiselab.reports.sweep_table import rows

    table = rows(sweep, [(job, look(job, sweep.metric)) for job in read_jobs(sweep)])
    columns = list(dict.fromkeys(key for row in table for key in row))
    with (sweep.folder / RESULTS).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    _print(sweep)
    print(f"written to {sweep.folder / RESULTS}")


def conclude(sweep: Sweep) -> None:
    """The closing table of a sweep.

    Raises:
        RankError: if a job has failed.
    """
    _print(sweep)
    states = [job.status.state for job in read_jobs(sweep)]
    failed = states.count("failed")
    if failed:
        raise RankError(
            f"{failed} of {len(states)} jobs failed; to do them again: python scripts/sweep.py resume {sweep.folder}"
        )


def _print(sweep: Sweep) -> None:
    from rich.console import Console

    from denoiselab.reports.sweep_table import print_sweep

    print_sweep(Console(), sweep, [(job, job.status) for job in read_jobs(sweep)])


def _check_at_once(value: int | str, key: str) -> None:
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"{key}={value}: must be at least 1, or auto for as many as have GPUs of their own")


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _resumable(sweep: Sweep) -> Iterator[None]:
    """Inside, who stops a sweep is told how to go on."""
    try:
        yield
    except Stopped as stopped:
        message = f"to go on: python scripts/sweep.py resume {sweep.folder}"
        raise Stopped(stopped.number, message) from stopped
