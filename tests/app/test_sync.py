"""What W&B receives of runs that are killed and resumed, from the real wandb-core, by a server that keeps it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from calls import ROOT, call, composed
from killing import UNET, start, wait
from PIL import Image

from denoiselab.training import wandb_sync
from denoiselab.training.checkpoint import newest_checkpoint, step_of
from denoiselab.training.wandb_history import read_sent
from denoiselab.training.wandb_identity import Identity, git_facts, write_identity
from wandb_server import wandb_server

AXIS = "train/seconds"
SECRET = "sentinel-0123456789"
TINY = [
    *UNET,
    "resume=auto",
    "metrics=none",
    "datamodule.batch_size=8",
    "datamodule.eval_batch_size=300",
    "sampler.nfe=2",
    "trainer.max_steps=12",
    "schedule.steps=12",
    "trainer.val_every=4",
    "callbacks.monitor.every=1",
    "callbacks.validation.log_snrs=[0]",
    "callbacks.checkpoints.every=4",
    "callbacks.pictures.every=4",
    "callbacks.pictures.rows=1",
    "+callbacks.recorder._target_=killing.Recorder",
]


@pytest.fixture
def server():
    with wandb_server() as server:
        yield server


@pytest.fixture
def logged_in(server, monkeypatch):
    """The commands of this process talk to the stand-in; W&B's client is told anew."""
    import wandb

    for key, value in (server.environment() | {"COLUMNS": "200"}).items():
        monkeypatch.setenv(key, value)
    wandb.teardown()
    yield server
    wandb.teardown()


def train(folder, *overrides, environment=None, **trap):
    """One start of the job; its exit code."""
    config = composed(*TINY, *overrides, f"run='{folder}'", f"+callbacks.recorder.file='{folder}.seen'")
    (end,) = wait(start(config, environment=environment, **trap))
    assert end in (0, -signal.SIGKILL), folder.with_suffix(".out").read_text()
    return end


def points_of(folder, last=None):
    """Each (step, key) that metrics.csv and samples/ have."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [
        (int(row["step"]), key) for row in rows for key, value in row.items() if value and key not in ("step", AXIS)
    ]
    names = [path.stem.split("_", 2) for path in (folder / "samples").glob("*.png")]
    found += [(int(step), f"samples/{weights}") for _, step, weights in names]
    return sorted(point for point in found if last is None or point[0] <= last)


def check_history(run, folder, last=None):
    """Each point has arrived once, none is missing, and the x-axis never goes back."""
    steps = [row["trainer/global_step"] for row in run.history]
    assert steps == sorted(steps)
    assert [row["_step"] for row in run.history] == list(range(len(steps)))
    arrived = [point for point in run.points() if point[1] != AXIS]
    numbers = {step for step, key in arrived if not key.startswith("samples/")}
    assert numbers == {step for step, key in run.points() if key == AXIS}
    assert len(set(arrived)) == len(arrived)
    assert sorted(arrived) == points_of(folder, last)


def test_a_killed_run_arrives_once_and_whole(tmp_path, logged_in):
    server, run = logged_in, tmp_path / "run"
    assert train(run, step=7, thing="step", count=0) == -signal.SIGKILL
    assert [int(row["step"]) for row in csv.DictReader((run / "metrics.csv").open())][-1] > 4

    done = call("sync", "run", cwd=tmp_path)  # so far as no resume will take it back
    assert (done.code, done.err) == (0, "")
    assert "up to its newest checkpoint, step 4" in done.out
    (stored,) = server.runs.values()
    check_history(stored, run, last=4)
    assert stored.preempting == 1  # more will come

    assert train(run) == 0
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert call("sync", "run", cwd=tmp_path).code == 0
    check_history(stored, run)
    assert stored.ends[-1] == 0
    assert stored.summary["status"] == "finished"
    assert stored.summary["trainer/global_step"] == 12
    row = next(row for row in csv.DictReader((run / "metrics.csv").open()) if row["step"] == "9")
    (sent,) = [r for r in stored.history if r["trainer/global_step"] == 9]
    assert sent["train/loss"] == float(row["train/loss"])
    assert {name for name in stored.files if name.endswith(".png")} != set()
    assert stored.config["parameters"] > 0
    assert stored.config["optimizer"]["lr"] == 0.001

    before = len(server.asked)
    assert "nothing new" in call("sync", "run", cwd=tmp_path).out
    assert len(server.asked) == before


@pytest.mark.slow
def test_what_is_new_is_sent_and_nothing_else(tmp_path, logged_in):
    server, run = logged_in, tmp_path / "run"
    assert train(run) == 0
    assert call("sync", "run", cwd=tmp_path).code == 0
    (stored,) = server.runs.values()
    assert train(run, "trainer.max_steps=14") == 0
    rows = len(stored.history)
    assert call("sync", "run", cwd=tmp_path).code == 0
    assert len(stored.history) == rows + 2
    check_history(stored, run)
    assert len(server.runs) == 1

    (run / "wandb" / "sent.json").unlink()  # whoever has sent it, W&B knows how far it has come
    before = len(server.asked)
    done = call("sync", "run", cwd=tmp_path)
    assert (done.code, len(stored.history)) == (0, rows + 2)
    assert len(server.asked) > before


@pytest.mark.slow
def test_what_does_not_arrive_is_not_noted(tmp_path, logged_in, monkeypatch):
    server, run = logged_in, tmp_path / "run"
    monkeypatch.setattr("denoiselab.training.wandb_sync.WAITS", (0.0,))
    assert train(run) == 0
    stream, server.stream = server.stream, lambda *_: None  # W&B's client thinks that all went well
    done = call("sync", "run", cwd=tmp_path)
    assert done.code == 1
    assert "has not confirmed" in done.out
    server.stream = stream
    assert call("sync", "run", cwd=tmp_path).code == 0
    (stored,) = server.runs.values()
    check_history(stored, run)


@pytest.mark.slow
def test_a_run_that_is_online_goes_on_where_wandb_stands(tmp_path, server):
    run = tmp_path / "run"
    online = server.environment()
    assert train(run, environment=online, step=7, thing="step", count=0) == -signal.SIGKILL
    (stored,) = server.runs.values()
    assert train(run, environment=online) == 0
    check_history(stored, run)
    assert stored.ends[-1] == 0
    assert stored.last("displayName") == stored.upserts[0]["displayName"]


def script(folder, *overrides, environment):
    """The job as a process of its own, which ends as Python ends."""
    line = [sys.executable, ROOT / "scripts" / "train.py", *TINY[:-1], *overrides, f"run='{folder}'"]
    at_once = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}
    return subprocess.Popen(line, env=os.environ | environment | at_once)


def until(true, seconds=120):
    """Wait for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_what_the_network_lost_is_made_up_for(tmp_path, server):
    run, online = tmp_path / "run", server.environment()
    long = [
        "trainer.max_steps=1000000",
        "trainer.val_every=1000",
        "callbacks.pictures=null",
        "callbacks.monitor.every=20",
    ]
    job = script(run, *long, environment=online | {"WANDB_FINISH_TIMEOUT": "2"})
    try:
        until(lambda: any(stored.history for stored in server.runs.values()))
        server.gone = True
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 75  # in time, for a batch system would not wait for W&B
    finally:
        job.kill()
    (stored,) = server.runs.values()
    assert f"send it with sync.py: {run}" in (run / "train.log").read_text()
    assert stored.ends == []
    server.gone = False
    last = step_of(newest_checkpoint(run))
    assert script(run, *long, f"trainer.max_steps={last + 20}", environment=online).wait(200) == 0
    check_history(stored, run)
    assert (len(server.runs), stored.ends) == (1, [0])


@pytest.mark.slow
def test_a_run_that_begins_waits_for_who_sends_it(tmp_path, server):
    run, online = tmp_path / "run", server.environment()
    assert train(run, step=7, thing="step", count=0) == -signal.SIGKILL  # offline
    on_its_way, lines, stream = [], [], server.stream

    def slow(*what):  # the first rows of sync.py are on their way until the run has asked, or says that it waits
        if not on_its_way:
            on_its_way.append(server.requests.count("RunResumeStatus"))
            log, asked = run / "train.log", lambda: server.requests.count("RunResumeStatus") > on_its_way[0]
            server.lock.release()
            until(lambda: asked() or "waiting for it" in log.read_text())
            server.lock.acquire()
        lines.extend(what[1].get("files", {}).get("wandb-history.jsonl", {"content": []})["content"])
        stream(*what)

    server.stream = slow
    line = [sys.executable, ROOT / "scripts" / "sync.py", run]
    sync = subprocess.Popen(line, env=os.environ | online)
    try:
        until(lambda: on_its_way)
        (job,) = start(composed(*TINY, f"run='{run}'", f"+callbacks.recorder.file='{run}.seen'"), environment=online)
        assert wait([job]) == [0]
        assert sync.wait(120) == 0
    finally:
        sync.kill()
    (stored,) = server.runs.values()
    check_history(stored, run)
    assert lines == stored.lines["wandb-history.jsonl"]  # none was sent twice


@pytest.mark.slow
def test_a_run_whose_first_process_is_killed_has_failed_in_wandb_too(tmp_path, server, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Deadly(Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_rank == 0 and trainer.global_step == 6:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "+callbacks.deadly._target_=deadly.Deadly"]
    run = tmp_path / "run"
    assert script(run, *two, environment=server.environment()).wait(200) == 1
    (stored,) = server.runs.values()
    assert stored.ends[-1] == 1
    assert stored.summary["status"] == "failed"
    check_history(stored, run)


def test_a_sync_that_was_killed_keeps_to_the_budget_of_pictures(tmp_path, logged_in, monkeypatch):
    run = tmp_path / "run"
    for folder in (run / "samples", run / "checkpoints"):
        folder.mkdir(parents=True)
    write_identity(run, Identity(name="a", images=2))
    (run / "config.json").write_text(json.dumps({"trainer": {"max_steps": 9}}))
    (run / "summary.json").write_text(json.dumps({"status": "finished", "metrics": {}}))
    (run / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1.0\n" for step in range(10)))

    def draw(*steps):
        for step in steps:
            Image.new("L", (3, 2)).save(run / "samples" / f"step_{step:07d}_ema.png")

    draw(5)
    with monkeypatch.context() as patch:

        def killed(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(wandb_sync, "write_sent", killed)
        with pytest.raises(KeyboardInterrupt):
            wandb_sync.send(run)
    assert read_sent(run).pictures == {5: 1}
    (run / "config.json").write_text(json.dumps({"trainer": {"max_steps": 19}}))
    (run / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1.0\n" for step in range(20)))
    draw(18, 19)
    assert wandb_sync.send(run).pictures == 1
    (stored,) = logged_in.runs.values()
    assert sum("/samples/" in name for name in stored.files) == 2


def test_a_sweep_is_sent_run_by_run(tmp_path, logged_in):
    server, sweep = logged_in, tmp_path / "sweeps" / "2026-01-01_00-00-00_objectives"
    run, never = sweep / "0_seed=0", sweep / "1_seed=1"
    sweep.mkdir(parents=True)
    assert train(run, "trainer.max_steps=4", "logger.images=1") == 0
    (sweep / "sweep.json").write_text(json.dumps({"name": "objectives"}))
    (run / "job.json").write_text(json.dumps({"number": 0, "name": "seed=0"}))
    (run / "wandb" / "identity.json").unlink()  # as of a run that is older than these
    config = json.loads((run / "config.json").read_text())  # of somebody who has not hidden it
    config["callbacks"]["hub"] = {"api_key": SECRET}
    config["logger"]["notes"] = f"mine, token={SECRET}"
    (run / "config.json").write_text(json.dumps(config))
    never.mkdir()
    (never / "job.json").write_text(json.dumps({"number": 1, "name": "seed=1"}))

    done = call("sync", "sweeps/2026-01-01_00-00-00_objectives", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "has not begun" in done.out
    (stored,) = server.runs.values()
    assert (stored.last("displayName"), stored.last("groupName")) == ("seed=0", "objectives")
    assert (stored.last("jobType"), stored.last("tags")) == ("train", ["digits", "unet", "rectified_flow"])
    assert stored.last("commit") == (git_facts() or {}).get("commit")
    assert stored.config["sweep_folder"] == sweep.name
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert stored.last("notes") == "mine, token=***"
    assert stored.config["callbacks"]["hub"] == {"api_key": "***"}
    assert not any(SECRET.encode() in body for body in server.bodies)
    assert sum("/samples/" in name for name in stored.files) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs=[]: name run folders or sweeps"),
        (["nowhere"], "runs=nowhere: there is no run folder, nor a folder of some"),
        (["runs=3"], "runs=3: must be"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    done = call("sync", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []
