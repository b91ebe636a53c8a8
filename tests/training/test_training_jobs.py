"""Whole jobs through the command, as a user starts them, and what they leave behind."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint, step_name
from denoiselab.training.history import read_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "name=job",
    "backbone.width=8",
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "datamodule.batch_size=8",
    "sampler.nfe=2",
    "schedule.warmup_steps=2",
    "trainer.max_steps=4",
    "trainer.val_every=2",
    "callbacks.monitor.every=1",
    "callbacks.pictures.every=2",
    "callbacks.pictures.rows=1",
    "callbacks.checkpoints.every=2",
]
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
TROUBLE = """
import os
import signal
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from torch.utils.data import get_worker_info

from denoiselab.data.dataset import InMemoryImages


def fail():
    Path("began").touch()
    raise RuntimeError("deliberate trouble\\nof several lines")


class Trouble(Callback):
    def __init__(self, *, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            fail()


class TroubleInAWorker(Callback):
    def __init__(self, *, killed: bool) -> None:
        self.killed, self.images = killed, 0

    def setup(self, trainer, module, stage):
        real = InMemoryImages.image

        def image(samples, index):
            self.images += get_worker_info() is not None
            if self.images > 20 and self.killed:
                Path("began").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return fail() if self.images > 20 else real(samples, index)

        InMemoryImages.image = image
"""
CAUSE = "RuntimeError: deliberate trouble of several lines"


@dataclass
class Job:
    code: int
    output: str
    folders: list[Path]
    ended: float

    @property
    def folder(self):
        (only,) = self.folders
        return only

    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    def wandb_records(self):
        """The records of the job's one W&B run."""
        (run,) = (self.folder / "wandb").glob("offline-run-*")
        (file,) = run.glob("*.wandb")
        program = Path(sys.executable).with_name("wandb")
        command = [program, "leet", "inspect", "--json", file]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        return [(record["type"], record[record["type"]]) for record in records]

    def wandb_exit(self):
        return [record.get("exit_code", 0) for kind, record in self.wandb_records() if kind == "exit"]

    def losses(self):
        with (self.folder / "metrics.csv").open() as file:
            return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def run(folder, *overrides):
    """Train in `folder`, far from the checkout; a job that hangs (on a lost rank: for half an hour) is an error."""
    job = begin(folder, *overrides)
    try:
        out, err = job.communicate(timeout=150)
        ended = time.time()
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    folders = sorted((folder / "runs").iterdir()) if (folder / "runs").is_dir() else []
    return Job(job.returncode, out + err, folders, ended)


def begin(folder, *overrides):
    """Begin to train in `folder`, as the leader of a group of processes."""
    (folder / "trouble.py").write_text(TROUBLE)
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
        "DENOISELAB_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, ROOT / "scripts/train.py", *SMALL, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **pipes)


def wait_until(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16) >> (number - 1) & 1


def trouble(rank):
    return ["+callbacks.trouble._target_=trouble.Trouble", f"+callbacks.trouble.rank={rank}", "metrics=none"]


FEW = [f"metrics.measures.{name}=null" for name in ("kernel", "precision_recall", "density_coverage")]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), "metrics.counts=[20]", *FEW)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), *TWO_RANKS, "metrics.counts=[21]", *FEW)


def test_a_job_succeeds_and_says_where_it_went(one_rank):
    assert one_rank.code == 0, one_rank.output
    assert one_rank.output.count(str(one_rank.folder)) == 2  # at the start and at the end, never broken over lines
    summary = one_rank.summary()
    assert (summary["status"], summary["error"], summary["steps"]) == ("finished", None, 4)
    assert summary["checkpoint"] == "checkpoints/step_0000004.ckpt"
    assert set(summary["metrics"]) >= {"fd_digits_20", "accuracy_digits_20"}
    held = {path.name for path in one_rank.folder.iterdir()}
    assert held == {
        "config.json",
        "command.json",
        "versions.json",
        "summary.json",
        "metrics.csv",
        "metrics.jsonl",
        "trace.csv",
        "starts.jsonl",
        "id",
        ".lock",
        ".writing",
        "train.log",
        "checkpoints",
        "samples",
        "wandb",
    }


def history_of(records):
    return [row["item"] for kind, row in records if kind == "history"]


def test_wandb_has_it_all(one_rank):
    records = one_rank.wandb_records()
    stored = {}
    for kind, record in records:
        if kind == "config":
            stored |= record["update"]
    config = json.loads((one_rank.folder / "config.json").read_text())
    assert config.keys() <= stored.keys()
    assert stored["optimizer"]["lr"] == config["optimizer"]["lr"]
    assert stored["backbone"] == config["backbone"]
    assert stored["parameters"] > 0

    protocol = stored["protocols"]["metrics/fd_digits_20"]
    assert (protocol["count"], protocol["weights"], protocol["extractor"]) == (20, "ema", "digits")

    metrics = [record for kind, record in records if kind == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "trainer/global_step" for m in metrics)

    history = history_of(records)
    assert all("trainer/global_step" in row for row in history)

    def steps_with(key):
        return [row["trainer/global_step"] for row in history if key in row]

    for key in ("train/loss", "train/grad_norm", "train/images_per_second", "train/lr"):
        assert steps_with(key) == [1, 2, 3, 4]
    for key in ("val/x0_mse/log_snr_0", "val/epsilon_mse/log_snr_-4", "val/x0_mse", "val/epsilon_mse"):
        assert steps_with(key) == [2, 4]
    assert any(key.startswith("train/loss_by_log_snr/") for row in history for key in row)
    for weights in ("raw", "ema"):
        assert steps_with(f"samples/{weights}.filenames") == [2, 4]
    for key in ("metrics/fd_digits_20", "metrics/fd_digits_20_real", "metrics/accuracy_digits_20_low"):
        assert steps_with(key) == [4]
    assert one_rank.wandb_exit() == [0]
    summary = {}
    for kind, record in records:
        if kind == "summary":
            summary |= record["update"]
    assert summary["status"] == "finished"


def test_wandb_has_the_pictures(one_rank):
    (run_folder,) = (one_rank.folder / "wandb").glob("offline-run-*")
    for row in history_of(one_rank.wandb_records()):
        for key, names in row.items():
            if key.endswith(".filenames"):
                assert all((run_folder / "files" / name).stat().st_size > 0 for name in names)


def test_the_csv_and_wandb_agree(one_rank):
    history = history_of(one_rank.wandb_records())
    logged = {row["trainer/global_step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert one_rank.losses() == pytest.approx(logged)


def test_two_ranks_are_one_run(two_ranks):
    assert two_ranks.code == 0, two_ranks.output
    history = history_of(two_ranks.wandb_records())  # there is exactly one folder, or this fails
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == [1, 2, 3, 4]
    assert two_ranks.wandb_exit() == [0]
    assert two_ranks.summary()["status"] == "finished"
    lines = [line for line in two_ranks.output.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]  # one rank speaks


def test_two_ranks_train_what_one_does(one_rank, two_ranks):
    assert two_ranks.losses() == pytest.approx(one_rank.losses(), rel=1e-4)
    one, two = (load_checkpoint(newest_checkpoint(job.folder)) for job in (one_rank, two_ranks))
    assert one["state_dict"].keys() == two["state_dict"].keys()  # no DDP prefix
    for key, value in one["state_dict"].items():
        # Adam divides by √v: where a gradient is next to nothing, rounding is not
        assert float((two["state_dict"][key] - value).abs().mean()) < 1e-4


def test_two_ranks_validate_and_measure_what_one_does(one_rank, two_ranks):
    def rows(job, key):
        return [row[key] for row in history_of(job.wandb_records()) if key in row]

    for key in ("val/x0_mse", "val/epsilon_mse/log_snr_0"):
        assert rows(two_ranks, key) == pytest.approx(rows(one_rank, key), rel=1e-3)
    assert "fd_digits_21" in two_ranks.summary()["metrics"]


def check_the_end(job, pattern):
    """The first cause is the last line that is printed and logged, and the job ended within a minute."""
    assert job.code == 1
    last = job.output.splitlines()[-1]
    assert re.fullmatch(f"error: {pattern}", last), job.output
    assert (job.folder / "train.log").read_text().splitlines()[-1].endswith(f" ERROR denoiselab: {last[7:]}")
    assert job.ended - (job.folder.parents[1] / "began").stat().st_mtime < 60
    assert job.summary()["status"] == "failed"
    assert job.wandb_exit() == [1]


def test_a_failing_job_says_so(tmp_path):
    job = run(tmp_path, *trouble(0))
    check_the_end(job, CAUSE)
    summary = job.summary()
    assert summary["error"] == CAUSE
    assert summary["steps"] == 3
    assert summary["checkpoint"] == "checkpoints/step_0000002.ckpt"  # what was saved before stays


def test_one_failing_rank_ends_the_whole_job(tmp_path):
    job = run(tmp_path, *trouble(1), *TWO_RANKS)
    check_the_end(job, f"rank 1 failed: {CAUSE}")


@pytest.mark.slow
def test_rank_0_failing_ends_the_whole_job(tmp_path):
    job = run(tmp_path, *trouble(0), *TWO_RANKS)
    check_the_end(job, f"rank 0 failed: {CAUSE}")
    assert job.summary()["error"] == CAUSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "pattern"),
    [
        (False, f"RuntimeError: Caught RuntimeError in DataLoader worker .*{CAUSE}"),
        (True, ".*DataLoader worker .*(pid|killed).*"),  # whichever is noticed first,
    ],
)
def test_a_failing_worker_ends_the_job(tmp_path, killed, pattern):
    target = "+callbacks.trouble._target_=trouble.TroubleInAWorker"
    job = run(tmp_path, target, f"+callbacks.trouble.killed={killed}", "metrics=none", "datamodule.num_workers=1")
    check_the_end(job, pattern)


@pytest.mark.slow
def test_two_ranks_that_accumulate_train_what_one_does(one_rank, tmp_path):
    job = run(tmp_path, *TWO_RANKS, "trainer.accumulate=2", "metrics=none", "logger=none")
    assert job.code == 0, job.output
    assert job.losses() == pytest.approx(one_rank.losses(), rel=1e-4)


@pytest.mark.slow
def test_a_repeated_job_is_the_same_bit_for_bit(one_rank, tmp_path):
    job = run(tmp_path, "metrics=none", "logger=none")
    assert job.losses() == one_rank.losses()
    assert not (job.folder / "wandb").exists()


LONG = [
    "trainer.max_steps=100000",
    "schedule.steps=100000",
    "trainer.val_every=50000",
    "metrics=none",
    "logger=none",
    "run=run",
    "resume=auto",
]


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", ["nothing", "the log", "a checkpoint"])
@pytest.mark.parametrize(("name", "code", "status"), [("SIGTERM", 75, "preempted"), ("SIGINT", 130, "interrupted")])
def test_a_signal_to_all_processes_stops_the_job_whenever_it_comes(tmp_path, name, code, status, wait_for):
    job = begin(tmp_path, *LONG, *TWO_RANKS, "datamodule.num_workers=2")
    awaited = {"nothing": "", "the log": "run/train.log", "a checkpoint": f"run/checkpoints/{step_name(2)}"}[wait_for]
    wait_until(lambda: (tmp_path / awaited).exists() or job.poll() is not None)
    if wait_for == "nothing":
        wait_until(lambda: catches(job.pid, signal.SIGTERM))  # from then on it imports
    os.killpg(job.pid, getattr(signal, name))
    _, err = job.communicate(timeout=100)
    assert job.returncode == code, err
    assert err.startswith(f"stopped by {name}")
    assert err.count("\n") == 1
    if wait_for != "nothing":
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == status


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_a_run_that_goes_on(tmp_path):
    job = begin(tmp_path, *LONG, *TWO_RANKS)
    wait_until(lambda: (tmp_path / "run" / "checkpoints" / step_name(2)).exists() or job.poll() is not None)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    job.kill()
    job.communicate(timeout=100)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    step = load_checkpoint(newest_checkpoint(tmp_path / "run"))["global_step"]
    assert read_rows(tmp_path / "run" / "trace.csv")[-1]["step"] == str(step)
    done = begin(tmp_path, *LONG, f"trainer.max_steps={step + 1}")
    _, err = done.communicate(timeout=100)
    assert done.returncode == 0, err
