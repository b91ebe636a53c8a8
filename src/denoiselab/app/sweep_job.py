"""One job of a sweep, in a process of its own: `python -m denoiselab.app.sweep_job <folder of the job>`."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from denoiselab.app.compose import answering
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.signals import held_back
from denoiselab.runs.sweep_folder import ended, membership, read_job, read_status, read_sweep, write_status

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Train what job.json says, and write down how it ends."""
    parser = argparse.ArgumentParser(description="One job of a sweep; started by its launcher.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", help="that it may use, such as 0,1")
    parser.add_argument("--trust", help="packages whose classes its config, which is not the caller's, may name")
    parser.add_argument("--stay", action="store_true", help="go on if the process that started it ends")
    options = parser.parse_args()
    began = time.time()
    with answering():
        if not options.stay:
            _end_with_parent()
        if options.cores:
            os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
        job = read_job(options.folder)
        metric = read_sweep(job.folder.parent).metric if membership(job.folder) else None
        status = replace(read_status(job.folder), state="running", exit_code=None, error=None)
        status = replace(status, attempts=status.attempts + 1)
        first = os.environ.get("RANK", "0") == "0"
        code, error = 1, None
        try:
            if first:
                write_status(job.folder, status)
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
            raise
        except Exception as failure:
            code = 2 if isinstance(failure, ConfigError) else 1
            known = isinstance(failure, ConfigError | RankError)
            error = " ".join((str(failure) if known else f"{type(failure).__name__}: {failure}").split())[:500]
            raise
        finally:
            if first:
                with held_back():
                    done = ended(job.folder, status, code, error, metric)
                    if metric is not None and done.metric is None:
                        done = replace(done, metric=_last_logged(job.folder, metric))
                    write_status(job.folder, replace(done, seconds=round(time.time() - began, 1)))


def _last_logged(folder: Path, metric: str) -> dict[str, Any] | None:
    """The newest value of a number that is not in the summary."""
    from denoiselab.training.history import series

    values = series(folder, metric)
    return {"name": metric, "value": values[max(values)]} if values else None


def _end_with_parent() -> None:
    """Ask the system for a SIGTERM when the process that started this one ends: a sweep that was killed leaves no jobs."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or parent == 1:  # it was killed just before
        raise Stopped(signal.SIGTERM, "the sweep that started it has gone")


if __name__ == "__main__":
    main()
