"""Sweeps as arrays of a real Slurm: they end, fail, are told to stop and queued again, and are cancelled."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from denoiselab.runs.sweep_folder import read_jobs, read_sweep
from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint
from wandb_server import wandb_server

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
SMALL = [
    "backbone.width=8",
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "datamodule.batch_size=8",
    "metrics=none",
    "schedule.warmup_steps=0",
    "trainer.threads=1",
    "trainer.max_steps=6",
    "callbacks.monitor.every=1",
    "callbacks.pictures=null",
    "+callbacks.trouble._target_=trouble.Trouble",
]
LONGER = ["trainer.max_steps=12", "callbacks.checkpoints.every=1000"]
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
STATE = ("state_dict", "ema", "optimizer_states")  # of a checkpoint
SLURM = [
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "+hydra.launcher.environment.MASTER_ADDR=127.0.0.1",
    "+hydra.launcher.environment.GLOO_SOCKET_IFNAME=lo",
]
TROUBLE = """
import time
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from denoiselab.training.signals import StopOnSignal


def starts(folder):
    return (Path(folder) / "starts.jsonl").read_text().splitlines()


class Trouble(Callback):
    def __init__(self, *, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer, module, *rest):
        if self.what == "slow":
            time.sleep(0.4)
        if self.what == "waits" and trainer.global_step == 5 and len(starts(trainer.default_root_dir)) == 1:
            (stop,) = (callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal))
            while stop.received is None:
                time.sleep(0.1)
        if trainer.global_rank == trainer.world_size - 1 and trainer.global_step == 3 and self.what == "raises":
            raise RuntimeError("deliberate trouble")
"""


@dataclass
class Submitted:
    """A working folder with a Slurm to submit to."""

    slurm: object
    folder: Path

    def __post_init__(self):
        (self.folder / "trouble.py").write_text(TROUBLE)
        self.environment = self.slurm.environment | {
            "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")]),
            "DENOISELAB_CACHE": str(self.folder / "cache"),
            "WANDB_MODE": "offline",
            "COLUMNS": "200",
        }

    def call(self, script, *typed, code=0, **environment):
        line = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, typed)]
        env = self.environment | environment
        done = subprocess.run(line, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name, *typed):
        began = time.monotonic()
        out = self.call("train", "-m", *SLURM, *SMALL, *typed, f"hydra.launcher.folder={name}")
        print(out, f"{time.monotonic() - began:.1f} s")
        assert f"python scripts/sweep.py status {self.folder / name}" in out
        return out

    def jobs(self, name):
        return read_jobs(read_sweep(self.folder / name))

    def wait(self, name, *states, seconds=400):
        end = time.monotonic() + seconds
        while not all(job.status.state in states for job in self.jobs(name)):
            assert time.monotonic() < end, f"{self.call('sweep', 'status', name)}\n{self.logs(name)}"
            time.sleep(0.5)
        return self.jobs(name)

    def array(self, name):
        return self.jobs(name)[0].status.cluster_job.partition("_")[0]

    def logs(self, name):
        out = io.StringIO()
        for path in [*(self.folder / name).glob("slurm/*.log"), *(self.folder / name).glob("*/job.log")]:
            with contextlib.suppress(OSError):
                out.write(f"--- {path}\n{path.read_text()[-1500:]}\n")
        return out.getvalue()


@pytest.fixture(scope="module")
def sweeps(slurm, tmp_path_factory):
    """All sweeps of this module, submitted at once: they share the nodes as they would."""
    here = Submitted(slurm, tmp_path_factory.mktemp("sweeps"))
    waits = ["+callbacks.trouble.what=waits", *LONGER]  # in the first turn, after step 5, until it is told to stop
    limit = ["hydra.launcher.time=3", "hydra.launcher.signal_seconds=15"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1"]
    here.submit("limit", *waits, *limit, *ddp, "trainer.num_nodes=1,2", "seed=7")
    here.submit("told", *waits, "seed=7,8")
    here.submit("four", "+callbacks.trouble.what=none,raises", "objective=v,x0", "hydra.launcher.at_once=2")
    here.submit("nodes", "+callbacks.trouble.what=none,raises", *ddp, "trainer.num_nodes=2")
    slow = ["+callbacks.trouble.what=slow", "trainer.max_steps=2000", "callbacks.checkpoints.every=1000"]
    here.submit("cancelled", *slow, "seed=8")
    return here


def starts_of(job):
    return [json.loads(line)["step"] for line in (job.folder / "starts.jsonl").read_text().splitlines()]


def steps_of(job):
    """How many rows its trace has."""
    trace = job.folder / "trace.csv"
    return trace.read_text().count("\n") - 1 if trace.exists() else 0


def until(true, sweeps, name, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, sweeps.logs(name)
        time.sleep(0.2)


def check_equal(job, sweeps, *ranks):
    """That a job which was stopped and queued again has ended as one that nobody stopped, bit for bit."""
    seed = job.config["seed"]
    straight = sweeps.folder / f"straight-{seed}-{len(ranks)}"
    if not straight.exists():
        few = [a for a in SMALL if "trouble" not in a]
        sweeps.call("train", *few, *LONGER, *ranks, f"seed={seed}", f"run={straight}")
    assert (job.folder / "trace.csv").read_bytes() == (straight / "trace.csv").read_bytes()
    ends = [load_checkpoint(newest_checkpoint(folder)) for folder in (job.folder, straight)]
    found, wanted = ({key: end[key] for key in (*STATE, "global_step")} for end in ends)
    assert unlike(found, wanted) == []
    starts = starts_of(job)
    assert job.status.attempts >= len(starts) >= 2, "it was never queued again"
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert len({path.name.rpartition("-")[2] for path in job.folder.glob("wandb/offline-run-*")}) == 1
    (record,) = sweeps.slurm.records(job.status.cluster_job)
    assert record["Restarts"] == str(job.status.attempts - 1)


def unlike(a, b, path=""):
    """Where two nested states differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        both = sorted({*a, *b}, key=str)
        return [p for key in both for p in unlike(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in unlike(x, y, f"{path}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path]


def test_an_array_of_four_of_which_two_fail(sweeps):
    jobs = sweeps.wait("four", "finished", "failed")
    found = {job.name: job.status for job in jobs}
    assert [status.state for status in found.values()] == ["finished", "finished", "failed", "failed"], sweeps.logs(
        "four"
    )
    assert all(status.error == "RuntimeError: deliberate trouble" for status in list(found.values())[2:])
    assert len({(job.folder / "id").read_text() for job in jobs}) == 4
    assert {job.status.cluster_job for job in jobs} == {f"{sweeps.array('four')}_{i}" for i in range(4)}
    out = sweeps.call("sweep", "status", "four")
    assert out.count("finished") == 2
    assert "job 2 failed: RuntimeError: deliberate trouble" in out
    assert not (sweeps.folder / "runs").exists()


def test_an_array_that_is_told_to_stop_ends_as_one_that_nobody_stopped(sweeps):
    """TERM to the ranks is how Slurm tells a job that is pre-empted and given time."""
    jobs = sweeps.jobs("told")
    assert {job.status.cluster_job for job in jobs} == {f"{sweeps.array('told')}_{i}" for i in range(2)}
    until(lambda: all(steps_of(job) == 5 for job in jobs), sweeps, "told")
    sweeps.slurm.run("scancel", "--signal=TERM", sweeps.array("told"))
    sweeps.wait("told", "finished")
    for job in jobs:
        check_equal(job, sweeps)


def test_two_ranks_on_two_nodes(sweeps):
    good, bad = sweeps.wait("nodes", "finished", "failed")
    assert (good.status.state, good.status.step) == ("finished", 6), sweeps.logs("nodes")
    assert "processes: 2" in (good.folder / "job.log").read_text()
    assert (bad.status.state, bad.status.error) == ("failed", "rank 1 failed: RuntimeError: deliberate trouble")
    assert json.loads((bad.folder / "summary.json").read_text())["error"] == bad.status.error
    assert json.loads((bad.folder / "summary.json").read_text())["status"] == "failed"


def test_what_is_cancelled_stays_so_and_can_be_gone_on_with(sweeps):
    (job,) = sweeps.jobs("cancelled")
    until(lambda: steps_of(job) > 4, sweeps, "cancelled")
    sweeps.slurm.run("scancel", sweeps.array("cancelled"))
    sweeps.wait("cancelled", "preempted", seconds=300)
    sweeps.slurm.wait(sweeps.array("cancelled"))
    time.sleep(3)
    assert set(sweeps.slurm.states(sweeps.array("cancelled"))) == {"CANCELLED"}
    assert "interrupted" in sweeps.call("sweep", "status", "cancelled")
    step = job.status.step
    assert step > 4
    sweeps.call("sweep", "resume", "cancelled", code=2)  # its config comes from a file now
    sweeps.call("sweep", "resume", "cancelled", "trust=[trouble]")
    until(lambda: steps_of(job) > step + 4, sweeps, "cancelled")
    assert starts_of(job) == [0, step]
    assert "1 jobs are in the queue already" in sweeps.call("sweep", "resume", "cancelled", "trust=[trouble]")
    sweeps.slurm.run("scontrol", "requeue", job.status.cluster_job)  # as Slurm itself does with what it ends at once
    until(lambda: len(starts_of(job)) > 2, sweeps, "cancelled")
    assert starts_of(job)[2] >= step
    sweeps.slurm.run("scancel", sweeps.array("cancelled"))


def test_jobs_of_one_and_two_nodes_that_reach_their_limit_end_as_those_that_nobody_stopped(sweeps):
    one, two = sweeps.wait("limit", "finished")
    assert one.status.cluster_job.partition("_")[0] != two.status.cluster_job.partition("_")[0]
    check_equal(one, sweeps)
    assert "processes: 2" in (two.folder / "job.log").read_text()
    check_equal(two, sweeps, *TWO_RANKS)
    check_history(one, sweeps)


def check_history(job, sweeps):
    """That all starts of a job are one W&B run, of which nothing is lost and nothing comes twice."""
    with wandb_server() as server:
        sweeps.call("sync", job.folder, **server.environment())
        (stored,) = server.runs.values()
    steps = [row["trainer/global_step"] for row in stored.history if "train/loss" in row]
    assert steps == list(range(1, job.config["trainer"]["max_steps"] + 1))
    points = stored.points()
    assert len(set(points)) == len(points)
    assert (stored.ends, stored.summary["status"]) == ([0], "finished")


def test_a_mistake_is_found_before_anything_is_submitted(sweeps):
    for typed, word in {
        "hydra.launcher.partition=nope": "invalid partition specified: nope",
        "hydra.launcher.nodes=2": "trainer.num_nodes=1; say trainer.num_nodes=2",
        "hydra.launcher.gpus_per_node=1": "trainer.accelerator=cpu",
        "hydra.launcher.cpus_per_task=500": "sbatch refuses",
        "optimizer.lr=-1": "optimizer.lr=-1: must be at least 0",
        "hydra.launcher.requeues=-1": "hydra.launcher.requeues=-1: must be at least 0",
    }.items():
        out = sweeps.call("train", "-m", *SLURM, *SMALL, "+callbacks.trouble.what=none", typed, "name=bad", code=2)
        assert word in out
        assert out.count("\n") == 1, out
    assert not (sweeps.folder / "sweeps").exists()
