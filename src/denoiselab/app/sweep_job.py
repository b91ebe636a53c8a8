"""One job of a sweep, in a process of its own: `python -m denoiselab.app.sweep_job <folder of the job>`."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from denoiselab.app.compose import answering
from denoiselab.app.local_sweep import last_logged
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.files import write_text
from denoiselab.runs.folder import working
from denoiselab.runs.launch import is_echo
from denoiselab.runs.signals import held_back
from denoiselab.runs.slurm import ATTEMPT, FAILED
from denoiselab.runs.sweep_folder import Status, ended, membership, read_job, read_status, read_sweep, write_status

TASK = "DENOISELAB_SLURM_TASK"  # variable: "51_0", the task of an array that this process belongs to
STUCK = "its time ended twice before it had made a step: hydra.launcher.time must be longer"
ECHO = 20.0  # seconds in which the others can end in good order
KILLED = 137  # exit code, as shells and srun say it
_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Train what job.json says, and write down how it ends."""
    parser = argparse.ArgumentParser(description="One job of a sweep; started by its launcher.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", help="that it may use, such as 0,1")
    parser.add_argument("--trust", help="packages whose classes its config, which is not the caller's, may name")
    parser.add_argument("--stay", action="store_true", help="go on if the process that started it ends")
    parser.add_argument("--conclude", type=int, help="only write down that it has ended with this exit code")
    parser.add_argument("--because", help="why, where it has not said so itself")
    parser.add_argument("--code", type=Path, help="the folder of packages that this code has to be in")
    options = parser.parse_args()
    began = time.time()
    several = _join_step(os.environ)
    alone = options.conclude is None and os.environ.get("RANK", "0") == "0"
    with answering(), working(options.folder) if alone else nullcontext():
        if not options.stay:
            _end_with_parent()
        if options.cores:
            os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
        job = read_job(options.folder)
        if options.conclude is not None:
            _conclude(job.folder, read_status(job.folder), options.conclude, options.because)
            return
        metric = read_sweep(job.folder.parent).metric_name if membership(job.folder) else None
        status = replace(read_status(job.folder), state="running", exit_code=None, error=None)
        status = replace(status, attempts=status.attempts + 1, cluster_job=os.environ.get(TASK) or status.cluster_job)
        first = os.environ.get("RANK", "0") == "0"
        code, error, echo, stuck, saved = 1, None, False, False, _saved(job.folder)
        try:
            if first:
                write_status(job.folder, status)
            if several:
                _end_together(job.folder, status)
            if options.code is not None and not Path(__file__).resolve().is_relative_to(options.code.resolve()):
                raise ConfigError(
                    f"code={options.code}: the code of this sweep is not there on {platform.node()}; DENOISELAB_CACHE must be "
                    "on a disk that all nodes see, or hydra.launcher.freeze=false"
                )
            with held_back():  # libraries answer an interrupted import in ways of their own
                from denoiselab.app.train import train
                from denoiselab.app.trained import without_consent
                from denoiselab.runs.trust import check_targets
            config = job.config | {"run": str(job.folder), "resume": "auto"}
            if options.trust is not None:
                config |= {"trust": [package for package in options.trust.split(",") if package]}
                check_targets(config, config["trust"])
                config = without_consent(config)
            train(config, job.choices, job.overrides)
            code = 0
        except Stopped as stopped:
            code = stopped.code
            limit = stopped.number == signal.SIGUSR1 and os.environ.get(TASK) is not None
            stuck = limit and status.attempts > 1 and _saved(job.folder) == saved
            raise
        except Exception as failure:
            code = 2 if isinstance(failure, ConfigError) else 1
            known, echo = isinstance(failure, ConfigError | RankError), is_echo(failure)
            error = " ".join((str(failure) if known else f"{type(failure).__name__}: {failure}").split())[:500]
            raise
        finally:
            if several and error is not None:
                error = _first_cause(job.folder, error, echo)
            if first:
                with held_back():
                    done = ended(job.folder, status, code, error, metric, last_logged(job.folder, metric))
                    if stuck:  # which its script reads, too
                        done = replace(done, state="failed", error=STUCK)
                    write_status(job.folder, replace(done, seconds=round(time.time() - began, 1)))


def _join_step(environment: MutableMapping[str, str]) -> bool:
    """Take the place in a job of processes that srun has started, as torchrun would say it; whether there are several.

    What else Slurm says is taken away: Lightning would make something of it.
    """
    said = {key: value for key, value in environment.items() if key.startswith("SLURM_") and key != "SLURM_CONF"}
    if "SLURM_STEP_ID" not in said:
        return False
    if "SLURM_ARRAY_JOB_ID" in said:
        environment[TASK] = f"{said['SLURM_ARRAY_JOB_ID']}_{said['SLURM_ARRAY_TASK_ID']}"
    for key in said:
        del environment[key]
    if int(said["SLURM_STEP_NUM_TASKS"]) > 1:
        environment.update(
            {
                "RANK": said["SLURM_PROCID"],
                "WORLD_SIZE": said["SLURM_STEP_NUM_TASKS"],
                "LOCAL_RANK": said["SLURM_LOCALID"],
                "LOCAL_WORLD_SIZE": said["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
                "GROUP_RANK": said["SLURM_NODEID"],
                "TORCHELASTIC_RUN_ID": said[
                    "SLURM_JOB_ID"
                ],  # by which Lightning knows processes that are started for it
            }
        )
    return int(said["SLURM_STEP_NUM_TASKS"]) > 1


def _end_together(folder: Path, status: Status) -> None:
    """From here on, this rank ends some time after another one has failed, whatever it is waiting for.

    Ranks that srun has started have no common parent who would see to that, and those on GPUs wait for one another for ever.
    """

    def watch() -> None:
        while _said(folder) is None:
            time.sleep(1.0)
        time.sleep(ECHO)
        if os.environ["RANK"] == "0":
            _conclude(folder, status, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _said(folder: Path) -> str | None:
    """Why a rank has failed in this attempt; None if none has said so.

    What another attempt has left does not count: on a disk of several machines it may be seen for a while after it has gone.
    """
    from denoiselab.runs.files import read_small

    try:
        attempt, _, cause = read_small(folder / FAILED, 2000).decode(errors="replace").strip().partition(" ")
    except (FileNotFoundError, ConfigError):
        return None
    return cause if attempt == os.environ.get(ATTEMPT, "-") else None


def _first_cause(folder: Path, error: str, echo: bool) -> str:
    """Why a job of several ranks has failed, from one that has; the first one's word stands.

    Args:
        folder: of the job.
        error: of this rank.
        echo: whether that is how the end of another rank reaches this one.
    """
    from denoiselab.runs.files import read_json, write_json
    from denoiselab.runs.folder import SUMMARY

    cause = _said(folder)
    if cause is None:
        cause = "a rank ended without a word (killed?)" if echo else f"rank {os.environ['RANK']} failed: {error}"
        write_text(folder / FAILED, f"{os.environ.get(ATTEMPT, '-')} {cause}\n")
    if os.environ["RANK"] == "0" and (folder / SUMMARY).exists():
        write_json(folder / SUMMARY, read_json(folder / SUMMARY) | {"error": cause})
    return cause


def _conclude(folder: Path, status: Status, code: int, why: str | None = None) -> None:
    """Have a job's files say that it has failed, where they do not say how it has ended."""
    from denoiselab.runs.files import read_json, write_json
    from denoiselab.runs.folder import RUNNING, SUMMARY

    cause = _said(folder) or why or f"ended with exit code {code}" + (" (out of memory?)" if code == KILLED else "")
    if (folder / SUMMARY).exists() and read_json(folder / SUMMARY) == RUNNING:
        write_json(folder / SUMMARY, {"status": "failed", "error": cause})
    if status.state == "running" or why:
        write_status(folder, ended(folder, status, code, cause, logged=last_logged(folder, None)))


def _saved(folder: Path) -> set[str]:
    """The checkpoints that a job has; without torch, which takes a while to import."""
    return {path.name for path in (folder / "checkpoints").glob("step_*.ckpt")}


def _end_with_parent() -> None:
    """Ask the system for a SIGTERM when the process that started this one ends: a sweep that was killed leaves no jobs."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or parent == 1:  # it was killed just before
        raise Stopped(signal.SIGTERM, "the sweep that started it has gone")


if __name__ == "__main__":
    main()
