"""A real Slurm for tests: `scripts/slurm_local.sh` started and stopped, and its jobs submitted, watched and read."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_local.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SYSTEM = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")


def missing_programs() -> list[str]:
    """The programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SYSTEM)]


class Cluster:
    """A Slurm that is up.

    Args:
        folder: where its state is; jobs write what they like below `folder/jobs`.
        nodes: the number of its virtual nodes, n1, n2, …
    """

    def __init__(self, *, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = clean_environment() | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command printed that speaks to this Slurm, such as `sinfo`; its error output is the failure's text."""
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def submit(self, *options: str, script: str) -> str:
        """The id of a new job whose batch script is given by its text; the output stands in `folder/jobs/<id>.out`."""
        jobs = self.folder / "jobs"
        jobs.mkdir(exist_ok=True)
        file = jobs / f"{len(list(jobs.iterdir()))}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        output = "--output=%A_%a.out" if any(o.startswith("--array") for o in options) else "--output=%j.out"
        printed = self.run("sbatch", "--parsable", output, "--time=10", *options, str(file), cwd=jobs)
        return printed.strip().split(";")[0]

    def output(self, job: str) -> str:
        """What a job, `12`, or an array's task, `12_3`, printed."""
        return (self.folder / "jobs" / f"{job}.out").read_text()

    def records(self, job: str) -> list[dict[str, str]]:
        """What Slurm says of a job: a record, or one for each task of an array; nothing of a job that it forgot."""
        printed = self.run("scontrol", "show", "job", "--oneliner", job, check=False)
        return [dict(re.findall(r"(\w[\w:/]*)=(\S*)", line)) for line in printed.splitlines() if "JobId=" in line]

    def states(self, job: str) -> list[str]:
        """The state of a job, or of each task of an array."""
        return [record["JobState"] for record in self.records(job)]

    def wait(self, job: str, *states: str, seconds: float = 60) -> list[dict[str, str]]:
        """The records of a job once all are in one of these states, or have ended where none is named.

        Raises:
            AssertionError: not within so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            records = self.records(job)
            found = [record["JobState"] for record in records]
            if found and all(state in states if states else state not in UNFINISHED for state in found):
                return records
            assert time.monotonic() < end, f"job {job}: {found} after {seconds:g} s, not {states or 'ended'}"
            time.sleep(0.2)


def clean_environment() -> dict[str, str]:
    """This process's environment without another Slurm's variables, as if the tests did not run in a job themselves."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_", "SRUN_"))}
    return kept | {"PATH": SYSTEM}


@contextlib.contextmanager
def running_cluster(*, nodes: int = 2, cpus: int = 4) -> Iterator[Cluster]:
    """A Slurm of its own with so many nodes, stopped at the end together with all of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="denoiselab-slurm-", dir="/tmp"))  # a socket's path is short
    try:
        control("up", str(folder), str(nodes), str(cpus))
        yield Cluster(folder=folder, nodes=nodes)
    finally:
        control("down", str(folder))
        shutil.rmtree(folder)


def control(*arguments: str) -> str:
    """What `scripts/slurm_local.sh` printed.

    Raises:
        AssertionError: it failed, with what it said.
    """
    done = subprocess.run(
        [str(SCRIPT), *arguments], env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
