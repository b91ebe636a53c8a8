from __future__ import annotations

from types import SimpleNamespace

import wandb

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import sending
from denoiselab.training import wandb_run
from denoiselab.training.wandb_run import end_run, start_wandb


class Run:
    def __init__(self):
        self.id, self.summary, self.artifacts, self.ends, self.preempting = "a=b,c", {}, [], [], 0

    def mark_preempting(self):
        self.preempting += 1

    def finish(self, exit_code):
        self.ends.append(exit_code)

    def log_artifact(self, artifact, aliases):
        self.artifacts.append(artifact)


def checkpoints(run_dir):
    (run_dir / "checkpoints").mkdir()
    for name in ("step_0000004.ckpt", "step_0000008.ckpt", "best.ckpt", "best.json"):
        (run_dir / "checkpoints" / name).write_text(name)


def test_checkpoints_are_uploaded_only_if_asked(tmp_path):
    checkpoints(tmp_path)
    run = Run()
    end_run(run, {"fid": 3.0}, "finished")
    assert (run.artifacts, run.ends, run.summary) == ([], [0], {"fid": 3.0, "status": "finished"})
    end_run(run, {}, "finished", tmp_path)
    (artifact,) = run.artifacts
    assert artifact.name == "checkpoints-a-b-c"
    assert set(artifact.manifest.entries) == {"step_0000008.ckpt", "best.ckpt"}


def test_a_run_without_checkpoints_has_none_to_upload(tmp_path):
    run = Run()
    end_run(run, {}, "failed", tmp_path)
    assert (run.artifacts, run.ends) == ([], [1])


def test_a_run_that_goes_on_elsewhere_is_no_failure():
    run = Run()
    end_run(run, {}, "running")
    assert run.preempting == 1


def test_without_a_network_a_run_is_offline(tmp_path, monkeypatch, caplog):
    modes = []

    def init(*, mode, **_):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route")
        return SimpleNamespace()

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.init", init)
    start_wandb(tmp_path, "id", "train")
    assert modes == ["online", "offline"]
    assert "no route" in caplog.text


def test_who_sends_a_run_does_it_alone(tmp_path, monkeypatch):
    tries = []

    class Taken:
        def __enter__(self):
            tries.append(1)
            if len(tries) < 3:
                raise ConfigError("is being sent to W&B by another")

    monkeypatch.setattr(wandb_run, "sending", lambda run_dir: Taken())
    monkeypatch.setattr(wandb_run.time, "sleep", lambda seconds: None)
    assert wandb_run._lock(tmp_path) is not None  # once the other has done
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(wandb_run, "PATIENCE", -1.0)
    assert wandb_run._lock(tmp_path) is None  # and the run begins all the same
    with sending(tmp_path):
        assert (tmp_path / ".sending").exists()
