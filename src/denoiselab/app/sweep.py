"""`denoiselab-sweep`: go on with a sweep, look at it, or collect its numbers."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from denoiselab.app.local_sweep import LocalSweep, check_at_once, last_logged, print_sweep_of
from denoiselab.app.resume import is_plain
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import held, is_worked_on, working
from denoiselab.runs.frozen_code import freeze
from denoiselab.runs.slurm import OVER, in_queue
from denoiselab.runs.sweep_folder import (
    UNFINISHED,
    Job,
    Status,
    Sweep,
    ended,
    read_jobs,
    read_sweep,
    write_status,
    write_sweep,
)

PATIENCE = 60.0  # seconds for the jobs of a sweep that was killed to save and end
GONE = "gone from the queue"
RESULTS, STUDY = "results.csv", "study.db"
PLACE = {"folder": None, "root": "", "metric": None, "resume": True, "freeze": False, "dry_run": False}  # is known
OF_A_SEARCH = re.compile(
    r"hydra/sweeper=optuna|hydra/launcher=(local|ray)|hydra\.launcher\.(jobs|metric|root|folder|freeze)=[^$]*"
    r"|hydra\.launcher\.(cpus_per_process=\d+|address=(auto|null))"
    r"|hydra\.sweeper\.(metric|mode|trials|seed|sampler|startup|pruner|warmup)=[\w./-]*"
)
SWEEP_KEYS: dict[str, Any] = {
    "action": str | None,
    "folder": str | None,
    "jobs": int | str | None,
    "failed": bool,
    "code": str,
    "trust": list[str],
}


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
    with working(sweep.folder):
        sweep = read_sweep(sweep.folder)  # another process may have gone on with it until now
        if options["code"] == "now":
            sweep = replace(sweep, code=freeze())
            write_sweep(sweep)
        if not (sweep.folder / STUDY).exists():
            _go_on(sweep, options)
            return
    resume_search(sweep, options)


def _go_on(sweep: Sweep, options: dict[str, Any]) -> None:
    """Do what is unfinished of a sweep that is no search.

    Raises:
        ConfigError: if that cannot be.
    """
    if not sweep.jobs:
        raise ConfigError(f"sweep={sweep.folder}: was killed before its jobs were written; start it again")
    at_once = sweep.launcher.get("jobs", 1) if options["jobs"] is None else options["jobs"]
    check_at_once(at_once, "jobs")
    wanted = [state for state in UNFINISHED if options["failed"] or state != "failed"]
    todo = [job for job in read_jobs(sweep) if job.status.state in wanted]
    slurm = sweep.launcher.get("kind") == "slurm"
    print(f"sweep  {sweep.folder}")
    if not slurm:
        for job in todo:
            wait_for(job)
        todo = [job for job in todo if job.status.state in wanted]  # what has finished meanwhile is done
    print(f"{len(todo)} of {len(sweep.jobs)} jobs to do")
    if slurm:
        from denoiselab.app.cluster import resume_submitted

        resume_submitted(sweep, todo, options["trust"])
        return
    if not os.path.isdir(sweep.directory):
        raise ConfigError(f"sweep={sweep.folder}: was started from {sweep.directory}, which is not there")
    here = _again(sweep, at_once)
    here.do(todo, here.slots([job.config for job in todo]), options["trust"])
    here.conclude()


def _again(sweep: Sweep, at_once: int | str) -> LocalSweep:
    """A sweep on this machine or on a Ray cluster, with the settings that it was begun with."""
    from denoiselab.app.ray_sweep import RaySweep

    kind = RaySweep if sweep.launcher.get("kind") == "ray" else LocalSweep
    here = kind(settings=PLACE | sweep.launcher | {"jobs": at_once}, typed=[], trusted=[], sweep=sweep)
    here.check()
    return here


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

    if word in ("-m", "--multirun", "hydra.sweeper.params=null") or OF_A_SEARCH.fullmatch(word):
        return True
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    if not override.is_sweep_override():
        return is_plain(word) or (word.startswith("hydra.sweeper.params=") and _are_of_a_search(override.value()))
    key, interval = override.get_key_element(), isinstance(override.value(), IntervalSweep)
    values = ["0"] if interval else override.sweep_string_iterator()
    return all(is_plain(f"{key}={value}") for value in values)


def _are_of_a_search(params: Any) -> bool:
    """Whether keys and values that the sweeper reads as words of a command line are such of a search, and plain."""
    words = [f"{key}={value}" for key, value in params.items()] if isinstance(params, dict) else []
    return bool(words) and all("hydra" not in word and "$" not in word and _is_of_a_search(word) for word in words)


def wait_for(job: Job) -> None:
    """Wait until the processes of a sweep that was killed have saved.

    Raises:
        ConfigError: if they go on.
    """
    began = time.monotonic()
    while True:
        try:
            with working(job.folder), held(job.folder):
                return
        except ConfigError:
            if time.monotonic() - began > PATIENCE:
                raise
            time.sleep(0.5)


def look(job: Job, metric: str | None, queue: Mapping[str, str] | None) -> Status:
    """How a job stands; one that was killed without a word has failed.

    Args:
        job: to look at.
        metric: that stands for it.
        queue: what a batch system says of its tasks; None: it cannot be asked here.
    """
    status = job.status
    if status.cluster_job is not None and status.state in ("queued", "running", "preempted"):
        if queue is None:
            return status
        said = queue.get(status.cluster_job, GONE)
        if said == "COMPLETING":  # it may say yet how it ends
            return status
        if said not in (*OVER, GONE):
            return replace(status, state="running" if said == "RUNNING" else "queued")
        if status.state == "preempted" or said == "CANCELLED":
            return replace(status, state="interrupted" if said == "CANCELLED" else "preempted", error=None)
        why = f"ended without a word (Slurm: {said})"
        return ended(job.folder, status, 1, why, metric, last_logged(job.folder, metric))
    if status.state != "running" or is_worked_on(job.folder) or is_worked_on(job.folder.parent):  # who starts it
        return status
    return ended(job.folder, status, 1, "ended without a word (killed?)", metric, last_logged(job.folder, metric))


def look_at_all(sweep: Sweep) -> list[tuple[Job, Status]]:
    """How all jobs stand."""
    jobs = read_jobs(sweep)
    tasks = [task for job in jobs if (task := job.status.cluster_job)]
    queue = in_queue(tasks) if shutil.which("squeue") else None
    if tasks and queue is None:
        print("note   there is no squeue here: this is what the jobs' own files say")
    return [(job, look(job, sweep.metric_name, queue)) for job in jobs]


def _status(sweep: Sweep, options: dict[str, Any]) -> None:
    jobs = look_at_all(sweep)
    for job, status in jobs:
        # Of others it is written by who started them, or by themselves while they are at work.
        if status.cluster_job is not None and status != job.status and status.state not in ("queued", "running"):
            write_status(job.folder, status)
    print_sweep_of(sweep, jobs)


def _collect(sweep: Sweep, options: dict[str, Any]) -> None:
    """Write a table of all jobs: what varies, how each stands, and every number of its summary."""
    from denoiselab.reports.sweep_table import rows

    jobs = look_at_all(sweep)
    table = rows(sweep, jobs)
    columns = list(dict.fromkeys(key for row in table for key in row))
    with (sweep.folder / RESULTS).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    print_sweep_of(sweep, jobs)
    print(f"written to {sweep.folder / RESULTS}")
