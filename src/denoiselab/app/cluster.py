"""Sweeps on a Slurm cluster: checked, written and submitted; the command returns at once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from denoiselab.app.compose import Composition
from denoiselab.app.local_sweep import as_if_here, begin_sweep, check_jobs
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import cache_folder
from denoiselab.runs.frozen_code import freeze
from denoiselab.runs.secrets import MASK, changed_keys, is_secret_name, redact
from denoiselab.runs.slurm import (
    OVER,
    Shape,
    ask,
    check_sbatch,
    hidden_variables,
    in_queue,
    script,
    seconds_of,
    shape_of,
    submit,
    try_out,
    watch_lines,
    write_scripts,
)
from denoiselab.runs.sweep_folder import UNFINISHED, Job, Sweep, add_jobs, sweep_name, varying, write_status

SLURM_KEYS: dict[str, Any] = {
    "folder": str | None,
    "root": str,
    "metric": str | None,
    "dry_run": bool,
    "nodes": int | None,
    "gpus_per_node": int | None,
    "cpus_per_task": int | None,
    "mem": int | str | None,
    "time": int | str | None,
    "partition": str | None,
    "account": str | None,
    "qos": str | None,
    "at_once": int | None,
    "signal_seconds": int,
    "requeues": int,
    "python": str | None,
    "container": str | None,
    "prologue": list[str] | None,
    "environment": dict | None,
    "options": dict | None,
    "freeze": bool,
}
LEAST = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "at_once": 1, "signal_seconds": 1, "requeues": 0}
BEFORE = 120  # seconds: Slurm's signal may come 60 earlier, and a job needs some to begin
FIXED = {  # options of sbatch, and what says them
    "nodes": "trainer.num_nodes does",
    "ntasks": "trainer.devices does",
    "ntasks-per-node": "trainer.devices does",
    "time": "hydra.launcher.time does",
    "signal": "hydra.launcher.signal_seconds does",
    "requeue": "hydra.launcher.requeues does",
    "no-requeue": "hydra.launcher.requeues does",
    "array": "the sweep does",
    "output": "the sweep does",
    "open-mode": "the sweep does",
    "wrap": "the sweep does",
}
PATIENCE = 60.0  # seconds for a task that was cancelled to leave the queue
PLACE = ("folder", "root", "dry_run")  # of one sweep; all others say how its jobs are started


@dataclass
class SlurmSweep:
    """A sweep on a cluster, as its launcher is called once or several times.

    Args:
        settings: of the launcher.
        typed: overrides of the command line.
        sweep: once it has begun.
    """

    settings: dict[str, Any]
    typed: list[str]
    sweep: Sweep | None = None

    def launch(self, overrides: Sequence[Sequence[str]], composed: Sequence[Composition]) -> list[Job]:
        """Check the jobs, and submit them.

        Raises:
            ConfigError: if one is refused, here or by Slurm; then none is submitted.
        """
        check_settings(self.settings)
        varies = [varying(some, self.typed) for some in overrides]
        shapes = [shape_of(config, self.settings) for config, _, _ in composed]
        placed = [(_with_devices(a, shape), b, c) for (a, b, c), shape in zip(composed, shapes, strict=True)]
        check_jobs(varies, [(as_if_here(config), choices, some) for config, choices, some in placed])
        code = freeze() if self.settings["freeze"] else None
        dry = self.settings["dry_run"]
        if not dry:
            check_sbatch()
            preview = Sweep(Path("/sweep"), [], {}, os.getcwd(), code=code)
            for shape in dict.fromkeys(shapes):
                try_out(script(preview, shape, range(shapes.count(shape)), self.settings))
        if self.sweep is None:
            kept = {key: value for key, value in self.settings.items() if key not in PLACE}
            name = composed[0][0]["name"] or sweep_name(varies)
            self.sweep = begin_sweep(self.settings, {"kind": "slurm", **kept}, name, code=code)
            note_typed(kept)
        self.sweep, jobs = add_jobs(self.sweep, varies, placed)
        submit_jobs(self.sweep, jobs, self.settings, dry=dry)
        return jobs

    def conclude(self) -> None:
        """Nothing: the jobs go on by themselves."""


def check_settings(settings: dict[str, Any]) -> None:
    """See to it that the settings of the launcher are what they can be.

    Raises:
        ConfigError: otherwise.
    """
    for key, annotation in SLURM_KEYS.items():
        check_value(settings[key], annotation, f"hydra.launcher.{key}")
    for key, least in LEAST.items():
        if settings[key] is not None and settings[key] < least:
            raise ConfigError(f"hydra.launcher.{key}={settings[key]}: must be at least {least}")
    named = [f"environment.{key}" for key in settings["environment"] or {} if is_secret_name(str(key))]
    masked = [key for key, value in settings.items() if MASK in str(value)]  # it was on the command line
    for key in [*named, *masked, *changed_keys(settings, redact(settings))]:
        raise ConfigError(
            f"hydra.launcher.{key}: holds a secret, and Slurm stores scripts; run `wandb login` once, or let the prologue "
            "read it from a file (source ~/.secrets)"
        )
    for key in settings["options"] or {}:
        if key in FIXED:
            raise ConfigError(f"hydra.launcher.options.{key}: is not for options to say; {FIXED[key]}")
    limit, least = seconds_of(settings["time"]), settings["signal_seconds"] + BEFORE
    if limit is not None and limit <= least:
        raise ConfigError(
            f"hydra.launcher.time={settings['time']}: must be more than {least} s, for a job is told to save up to 60 s "
            f"before signal_seconds={settings['signal_seconds']}, and needs a minute to begin"
        )


def _with_devices(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The config with the number of devices that Slurm was asked for."""
    return config | {"trainer": config["trainer"] | {"devices": shape.tasks}}


def submit_jobs(
    sweep: Sweep,
    jobs: Sequence[Job],
    settings: dict[str, Any],
    *,
    dry: bool = False,
    trust: Sequence[str] | None = None,
) -> None:
    """Write a script for each shape of jobs, submit them, and say how to watch them.

    Args:
        sweep: that they belong to.
        jobs: to submit.
        settings: of the launcher.
        dry: only write the scripts.
        trust: as in `job_command`.

    Raises:
        ConfigError: if Slurm does not take one; then none is left in the queue.
    """
    groups: dict[Shape, list[Job]] = {}
    for job in jobs:
        groups.setdefault(shape_of(job.config, settings), []).append(job)
    texts = [script(sweep, shape, [job.number for job in group], settings, trust) for shape, group in groups.items()]
    paths = write_scripts(sweep, texts)
    if dry:
        print(
            "\n".join(
                f"script  {path}  ({len(group)} jobs)" for path, group in zip(paths, groups.values(), strict=True)
            )
        )
        return
    arrays: list[str] = []
    try:
        for text in texts:
            arrays.append(submit(text))
        for array, group in zip(arrays, groups.values(), strict=True):
            for job in group:
                status = replace(job.status, state="queued", cluster_job=f"{array}_{job.number}")
                write_status(job.folder, status)
        ask("scontrol", "release", ",".join(arrays))  # from now on their status is their own
    except BaseException:
        if arrays:
            ask("scancel", *arrays)
        raise
    print("\n".join(watch_lines(sweep, arrays, jobs)))
    hidden = hidden_variables()
    if hidden:
        print(f"note   {', '.join(hidden)}: not handed to Slurm, which would store it; for W&B, run `wandb login` once")


def resume_submitted(sweep: Sweep, todo: Sequence[Job], trust: Sequence[str]) -> None:
    """Submit what is unfinished and not in the queue, with the settings that the sweep was submitted with.

    Args:
        sweep: to go on with.
        todo: its unfinished jobs.
        trust: packages, beside ours, whose classes their configs may name.

    Raises:
        ConfigError: if nobody has typed these settings here, a config names what is not trusted, Slurm does not say what is
            in its queue, or does not take the jobs.
    """
    from denoiselab.runs.trust import check_targets

    settings = {key: value for key, value in sweep.launcher.items() if key != "kind"}
    full = settings | {"folder": None, "root": "", "dry_run": False}
    check_settings(full)
    if not _marker(settings).exists():
        raise ConfigError(f"sweep={sweep.folder}: was submitted by somebody else; what its jobs begin with is not run")
    check_sbatch()
    queue = _settled([task for job in todo if (task := job.status.cluster_job)])
    jobs = [job for job in todo if queue.get(job.status.cluster_job or "", OVER[0]) in OVER]
    jobs = [job for job in jobs if job.status.state in UNFINISHED]  # it may have ended well meanwhile
    if queued := len(todo) - len(jobs):
        print(f"{queued} jobs are in the queue already")
    for job in jobs:
        check_targets(job.config, trust)
    if jobs:
        submit_jobs(sweep, jobs, full, trust=trust)


def _settled(tasks: Sequence[str]) -> dict[str, str]:
    """What the queue says of tasks once none is about to leave it, as those that were just cancelled are, or after a while."""
    end = time.monotonic() + PATIENCE
    while "COMPLETING" in (queue := in_queue(tasks)).values() and time.monotonic() < end:
        time.sleep(1.0)
    return queue


def note_typed(settings: dict[str, Any]) -> None:
    """Remember that these settings were typed by whoever uses this machine: they hold commands."""
    marker = _marker(settings)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _marker(settings: dict[str, Any]) -> Path:
    text = json.dumps(settings, sort_keys=True)
    return cache_folder() / "launchers" / hashlib.sha256(text.encode()).hexdigest()[:16]
