"""What W&B receives of runs that are killed and resumed, from the real wandb-core, by a server that keeps it."""

from __future__ import annotations

import csv
import json
import signal

import pytest
from calls import call, composed
from killing import UNET, start, wait

from wandb_server import wandb_server

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
    found = [(int(row["step"]), key) for row in rows for key, value in row.items() if value and key != "step"]
    names = [path.stem.split("_", 2) for path in (folder / "samples").glob("*.png")]
    found += [(int(step), f"samples/{weights}") for _, step, weights in names]
    return sorted(point for point in found if last is None or point[0] <= last)


def check_history(run, folder, last=None):
    """Each point has arrived once, none is missing, and the x-axis never goes back."""
    steps = [row["trainer/global_step"] for row in run.history]
    assert steps == sorted(steps)
    assert [row["_step"] for row in run.history] == list(range(len(steps)))
    arrived = run.points()
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


@pytest.mark.slow
def test_what_the_network_lost_is_made_up_for(tmp_path, server):
    run = tmp_path / "run"
    assert train(run, step=7, thing="step", count=0) == -signal.SIGKILL  # offline
    assert train(run, environment=server.environment()) == 0
    (stored,) = server.runs.values()
    check_history(stored, run)


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
