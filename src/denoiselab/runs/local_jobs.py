"""Jobs of a sweep: some at a time, each a process group of its own, on this machine unless somebody else starts them.

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
from typing import Protocol

from denoiselab.runs.errors import Stopped
from denoiselab.runs.files import open_own, write_json
from denoiselab.runs.folder import RUNNING, SUMMARY
from denoiselab.runs.frozen_code import frozen
from denoiselab.runs.sweep_folder import LOG, Job, Logged, Status, Sweep, ended, read_plain, read_status, write_status

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


class Process(Protocol):
    """What does a job: a process group on this machine, or one elsewhere."""

    @property
    def returncode(self) -> int | None:
        """Once it is over, as of `subprocess.Popen`; None if it has not begun."""

    @property
    def why(self) -> str | None:
        """Why it is over, where its exit code does not say it."""

    def is_over(self) -> bool:
        """Whether it has ended with all its processes."""

    def tell(self, number: int) -> None:
        """Send it a signal, which makes it save."""

    def kill(self) -> None:
        """End it at once."""


class LocalProcess:
    """A job's process group on this machine.

    Args:
        command: of its first process.
        directory: to start in.
        log: that what it prints is added to.
        environment: of it.
    """

    why: str | None = None

    def __init__(self, *, command: Sequence[str], directory: str, log: Path, environment: Mapping[str, str]) -> None:
        self._over: float | None = None  # when its first process had gone
        with open_own(log, "ab", buffering=0) as file:
            self._popen = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`."""
        return self._popen.returncode

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._popen.pid

    def is_over(self) -> bool:
        """Whether it has ended with all its processes; what a first process leaves behind is ended."""
        code = self._popen.poll()
        if code is None:
            return False
        self._over = self._over or time.monotonic()
        patience = GRACE_SECONDS if code < 0 else 0.0
        group = -self._popen.pid
        try:
            if time.monotonic() - self._over < patience:
                os.kill(group, 0)
                return False
            os.kill(group, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return True

    def tell(self, number: int) -> None:
        """Send its first process a signal, which that hands on."""
        with suppress(ProcessLookupError):
            os.kill(self._popen.pid, number)

    def kill(self) -> None:
        """End all of it."""
        with suppress(ProcessLookupError):
            os.kill(-self._popen.pid, signal.SIGKILL)
        self._popen.wait()


Start = Callable[[Sweep, Job, Slot, Sequence[str] | None], Process]  # with what `job_command` takes as trust


@dataclass
class _Running:
    job: Job
    slot: Slot
    place: str
    process: Process
    began: float
    looked: float
    pruned: bool = False


def job_environment(environment: Mapping[str, str], slot: Slot, code: str | None = None) -> dict[str, str]:
    """The variables that a job begins with: those of this process, but for what would make it part of another job.

    Args:
        environment: of this process.
        slot: to work in.
        code: the name of the copy of the code that it runs.
    """
    kept = {key: value for key, value in environment.items() if not _FOREIGN.fullmatch(key)}
    paths = [os.path.abspath(path) for path in filter(None, kept.pop("PYTHONPATH", "").split(os.pathsep))]
    if code is not None:
        paths.insert(0, str(frozen(code)))
    if paths:  # none of them begins at the folder that a job starts in
        kept["PYTHONPATH"] = os.pathsep.join(paths)
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
    # -P: the folder that it starts in, which a foreign sweep names, brings no code along.
    line = [sys.executable, "-P", "-m", "denoiselab.app.sweep_job", str(folder)]
    line += ["--cores", ",".join(map(str, slot.cores))] if slot is not None and slot.cores is not None else []
    return line + ([] if trust is None else ["--trust", ",".join(trust)])


def start_here(sweep: Sweep, job: Job, slot: Slot, trust: Sequence[str] | None) -> Process:
    """Begin a job on this machine."""
    write_status(job.folder, replace(job.status, state="running", exit_code=None, error=None))
    return LocalProcess(
        command=job_command(job.folder, slot, trust),
        directory=sweep.directory,
        log=job.folder / LOG,
        environment=job_environment(os.environ, slot, sweep.code),
    )


def run_jobs(
    sweep: Sweep,
    jobs: Iterable[Job],
    slots: Sequence[Slot],
    *,
    total: int,
    say: Callable[[str], None],
    trust: Sequence[str] | None = None,
    start: Start = start_here,
    prune: Callable[[Job], bool] | None = None,
    done: Callable[[Job], None] | None = None,
    logged: Logged = lambda folder, metric: (None, None),
) -> None:
    """Do the jobs, one in each slot at a time, and write down how each ends.

    Args:
        sweep: that they belong to.
        jobs: the next is asked for when there is a slot for it.
        slots: as many as jobs work at a time.
        total: how many jobs there are or will be.
        say: shows a line.
        trust: as in `job_command`.
        start: begins a job.
        prune: is asked now and then whether a running job shall stop.
        done: is told of each that has ended.
        logged: what a job that could not say so itself has come to.

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
                slot, place, again = free.pop(0), f"[{job.number + 1}/{total}]", job.status.attempts > 0
                process = start(sweep, job, slot, trust)
                at_work.append(_Running(job, slot, place, process, time.monotonic(), time.monotonic()))
                how = "waits for room" if job.status.state == "queued" else "goes on" if again else "started"
                say(f"{place} {job.name}: {how}; {_near(job.folder / LOG)}")
            time.sleep(POLL_SECONDS)
            for one in list(at_work):
                if one.process.is_over():
                    at_work.remove(one)
                    free.append(one.slot)
                    _conclude(sweep, one, say, logged)
                    if done is not None:
                        done(one.job)
                elif prune is not None and not one.pruned and time.monotonic() - one.looked > WATCH_SECONDS:
                    one.looked = time.monotonic()
                    if prune(one.job):
                        one.pruned = True
                        one.process.tell(signal.SIGTERM)
    except Stopped as stopped:
        _stop(sweep, at_work, stopped, say, logged)
        raise


def _conclude(sweep: Sweep, one: _Running, say: Callable[[str], None], logged: Logged) -> None:
    """Write down how a job has ended, and say so."""
    folder = one.job.folder
    status, code, seconds = read_status(folder), one.process.returncode, time.monotonic() - one.began
    if code is None:
        say(f"{one.place} {one.job.name}: has not begun")
        return
    if status.state in ("queued", "running"):  # it could not say so itself
        killed = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        metric = sweep.metric_name
        status = ended(folder, status, code, one.process.why or killed + memory, metric, logged(folder, metric))
        if read_plain(folder / SUMMARY) == RUNNING:
            write_json(folder / SUMMARY, {"status": status.state, "error": status.error})
    if one.pruned and status.state == "preempted":
        status = replace(status, state="pruned")
    status = replace(status, seconds=round(seconds, 1))
    write_status(folder, status)
    say(f"{one.place} {one.job.name}: {outcome(status)}")


def outcome(status: Status) -> str:
    """How a job has ended, in a line."""
    number = status.metric
    shown = f"; {number['name']} {number['value']:.5g}" if number and status.state in ("finished", "pruned") else ""
    took = f" after {status.seconds:,.0f} s" if status.seconds is not None else ""
    why = f": {status.error}" if status.error else ""
    return f"{status.state}{took}{shown}{why}"


def _stop(sweep: Sweep, at_work: list[_Running], stopped: Stopped, say: Callable[[str], None], logged: Logged) -> None:
    """Hand a signal on to the jobs at work, and wait until they have saved; another signal kills them."""
    if at_work:
        say(f"stopped by {stopped.name}: {len(at_work)} at work save and stop; once more kills them")
    try:
        for one in at_work:
            one.process.tell(stopped.number)
        while any(not one.process.is_over() for one in at_work):
            time.sleep(POLL_SECONDS)
    except Stopped:
        for one in at_work:
            one.process.kill()
    for one in at_work:
        _conclude(sweep, one, say, logged)


def _near(path: Path) -> str:
    """A path as it is from here, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
