from __future__ import annotations

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
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
        return self

    def wait(self, timeout):
        """As of an artifact that is uploaded."""


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


def test_who_sends_a_run_does_it_alone(tmp_path, monkeypatch, caplog):
    tries = []

    class Taken:
        def __enter__(self):
            tries.append(1)
            if len(tries) < 3:
                raise ConfigError("is being sent to W&B by another")

        def __exit__(self, *_):
            tries.clear()

    monkeypatch.setattr(wandb_run, "sending", lambda run_dir: Taken())
    monkeypatch.setattr(wandb_run.time, "sleep", lambda seconds: None)
    with ExitStack() as lock:
        wandb_run._lock(tmp_path, lock)  # once the other has done
        assert len(tries) == 3
    assert tries == []
    monkeypatch.setattr(wandb_run, "PATIENCE", -1.0)
    with ExitStack() as lock:
        wandb_run._lock(tmp_path, lock)  # and the run begins all the same
        assert len(tries) == 1
    assert "rows may reach W&B twice" in caplog.text
    with sending(tmp_path):
        assert (tmp_path / ".sending").exists()


@pytest.mark.parametrize(("step", "allow", "said"), [(40, ["seed"], True), (57, ["seed"], False), (40, [], False)])
def test_a_seam_is_said(tmp_path, caplog, step, allow, said):
    wandb_run._warn_of_seam(tmp_path, 57)  # of a folder that nobody has started
    (tmp_path / "config.json").write_text(json.dumps({"allow": allow}))
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n' + json.dumps({"step": step}) + "\n")
    wandb_run._warn_of_seam(tmp_path, 57)
    line = "goes on from step 40 with allow=[seed], and W&B has its steps up to 57"
    assert (line in caplog.text) is said
    assert len(caplog.records) == said
