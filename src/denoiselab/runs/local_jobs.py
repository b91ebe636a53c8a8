"""Jobs of a sweep on this machine: some at a time, each a process group of its own.

A job is a fresh process that reads its composed config from a file. It shares nothing with the others but the machine: no
variables of a distributed job or of a W&B run that the sweep may have been started within, no port (each finds a free one),
no devices when several work at a time. Whatever becomes of a job, it is written down and the next one starts. If this
process is killed, its jobs are told to stop, save, and can be resumed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from denoiselab.runs.errors import Stopped
from denoiselab.runs.folder import open_own
from denoiselab.runs.frozen_code import frozen
from denoiselab.runs.sweep_folder import LOG, Job, Status, Sweep, ended, read_status, write_status

POLL_SECONDS = 0.2
WATCH_SECONDS = 2.0  # between looks at the numbers of a running job
GRACE_SECONDS = 30.0  # for the other processes of a job whose first was killed: they save
_FOREIGN = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|NODE_RANK|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*|SLURM_(?!CONF$).*|SRUN_.*|PMI_.*|PMIX_.*|OMPI_.*"
    r"|WANDB_(RUN_ID|RUN_GROUP|RESUME|NAME|JOB_TYPE|SWEEP_ID|NOTES|TAGS|DIR|SERVICE))"
)


@dataclass(frozen=True)
class Slot:
    """What one of the jobs that work at a time has of the machine.

    Args:
        cores: that its processes may use; None: all.
        gpus: their numbers or UUIDs; None: all.
    """

    cores: tuple[int, ...] | None = None
    gpus: tuple[str, ...] | None = None


@dataclass
class _Running:
    job: Job
    slot: Slot
    place: str
    process: subprocess.Popen[bytes]
    began: float
    looked: float
    over: float | None = None  # when its first process had gone
    pruned: bool = False


def job_environment(environment: Mapping[str, str], slot: Slot, code: str | None = None) -> dict[str, str]:
    """The variables that a job begins with: those of this process, but for what would make it part of another job.

    Args:
        environment: of this process.
        slot: to work in.
        code: the name of the copy of the code that it runs.
    """
    kept = {key: value for key, value in environment.items() if not _FOREIGN.fullmatch(key)}
    if code is not None:
        kept["PYTHONPATH"] = os.pathsep.join([str(frozen(code)), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | ({} if slot.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)})


def share_out(at_once: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """The machine in equal parts.

    Args:
        at_once: jobs that work at a time.
        cores: of this machine; jobs share them where there are too few.
        gpus: to give out; what does not divide stays idle.
    """
    if at_once == 1:
        return [Slot(gpus=tuple(gpus) or None)]
    each, most = len(gpus) // at_once, max(1, len(cores) // at_once)
    return [
        Slot(
            cores=tuple(cores[(i * most + k) % len(cores)] for k in range(most)),
            gpus=tuple(gpus[i * each : (i + 1) * each]) if gpus else None,
        )
        for i in range(at_once)
    ]


def job_command(folder: Path, slot: Slot | None = None, trust: Sequence[str] | None = None) -> list[str]:
    """The command line of a job's process.

    Args:
        folder: of the job.
        slot: to work in.
        trust: None if its config was composed by whoever starts it; else packages, beside ours, whose classes it may name.
    """
    line = [sys.executable, "-m", "denoiselab.app.sweep_job", str(folder)]
    line += ["--cores", ",".join(map(str, slot.cores))] if slot is not None and slot.cores is not None else []
    return line + ([] if trust is None else ["--trust", ",".join(trust)])


def run_jobs(
    sweep: Sweep,
    jobs: Iterable[Job],
    slots: Sequence[Slot],
    *,
    total: int,
    say: Callable[[str], None],
    trust: Sequence[str] | None = None,
    prune: Callable[[Job], bool] | None = None,
    done: Callable[[Job], None] | None = None,
) -> None:
    """Do the jobs, one in each slot at a time, and write down how each ends.

    Args:
        sweep: that they belong to.
        jobs: the next is asked for when there is a slot for it.
        slots: as many as jobs work at a time.
        total: how many jobs there are or will be.
        say: shows a line.
        trust: as in `job_command`.
        prune: is asked now and then whether a running job shall stop.
        done: is told of each that has ended.

    Raises:
        Stopped: if a signal stops them; they have saved.
    """
    waiting, free, more = iter(jobs), list(slots), True
    at_work: list[_Running] = []
    try:
        while more or at_work:
            while more and free:
                job = next(waiting, None)
                if job is None:
                    more = False
                    break
                at_work.append(_start(sweep, job, free.pop(0), f"[{job.number + 1}/{total}]", trust, say))
            time.sleep(POLL_SECONDS)
            for one in list(at_work):
                if _is_over(one):
                    at_work.remove(one)
                    free.append(one.slot)
                    _conclude(sweep, one, say)
                    if done is not None:
                        done(one.job)
                elif prune is not None and not one.pruned and time.monotonic() - one.looked > WATCH_SECONDS:
                    one.looked = time.monotonic()
                    if prune(one.job):
                        one.pruned = True
                        _tell(one, signal.SIGTERM)
    except Stopped as stopped:
        _stop(sweep, at_work, stopped, say)
        raise


def _start(
    sweep: Sweep, job: Job, slot: Slot, place: str, trust: Sequence[str] | None, say: Callable[[str], None]
) -> _Running:
    status = job.status
    write_status(job.folder, replace(status, state="running", exit_code=None, error=None))
    with open_own(job.folder / LOG, "ab", buffering=0) as log:
        process = subprocess.Popen(
            job_command(job.folder, slot, trust),
            cwd=sweep.directory,
            env=job_environment(os.environ, slot, sweep.code),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    say(f"{place} {job.name}: {'started' if status.attempts == 0 else 'goes on'}; {_near(job.folder / LOG)}")
    return _Running(job, slot, place, process, time.monotonic(), time.monotonic())


def _is_over(one: _Running) -> bool:
    """Whether a job has ended with all its processes; what a first process leaves behind is ended."""
    if one.process.poll() is None:
        return False
    one.over = one.over or time.monotonic()
    patience = GRACE_SECONDS if one.process.returncode < 0 else 0.0
    group = -one.process.pid
    try:
        if time.monotonic() - one.over < patience:
            os.kill(group, 0)
            return False
        os.kill(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return True


def _conclude(sweep: Sweep, one: _Running, say: Callable[[str], None]) -> None:
    """Write down how a job has ended, and say so."""
    status, code, seconds = read_status(one.job.folder), one.process.returncode, time.monotonic() - one.began
    if status.state == "running":  # it could not say so itself
        killed = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        status = ended(one.job.folder, status, code, killed + memory, sweep.metric_name)
    if one.pruned and status.state == "preempted":
        status = replace(status, state="pruned")
    status = replace(status, seconds=round(seconds, 1))
    write_status(one.job.folder, status)
    say(f"{one.place} {one.job.name}: {outcome(status)}")


def outcome(status: Status) -> str:
    """How a job has ended, in a line."""
    number = status.metric
    shown = f"; {number['name']} {number['value']:.5g}" if number and status.state in ("finished", "pruned") else ""
    took = f" after {status.seconds:,.0f} s" if status.seconds is not None else ""
    why = f": {status.error}" if status.error else ""
    return f"{status.state}{took}{shown}{why}"


def _tell(one: _Running, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(one.process.pid, number)


def _stop(sweep: Sweep, at_work: list[_Running], stopped: Stopped, say: Callable[[str], None]) -> None:
    """Hand a signal on to the jobs at work, and wait until they have saved; another signal kills them."""
    if at_work:
        say(f"stopped by {stopped.name}: {len(at_work)} at work save and stop; once more kills them")
    try:
        for one in at_work:
            _tell(one, stopped.number)
        while any(not _is_over(one) for one in at_work):
            time.sleep(POLL_SECONDS)
    except Stopped:
        for one in at_work:
            with suppress(ProcessLookupError):
                os.kill(-one.process.pid, signal.SIGKILL)
            one.process.wait()
    for one in at_work:
        _conclude(sweep, one, say)


def _near(path: Path) -> str:
    """A path as it is from here, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
