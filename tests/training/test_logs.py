from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from PIL import Image

from denoiselab.training.history import CSVLogger
from denoiselab.training.logs import (
    finish,
    log_image,
    log_metrics,
    no_logger,
    tensorboard_logger,
    wandb_logger,
)
from denoiselab.training.wandb_history import History
from denoiselab.training.wandb_run import RunLogger


def trainer_with(*loggers, rank=0, step=7):
    return SimpleNamespace(loggers=list(loggers), is_global_zero=rank == 0, global_step=step)


@pytest.fixture
def wandb_runs(monkeypatch):
    """What wandb.init is called with."""
    calls = []

    class Run:
        def __init__(self):
            self.offline = calls[-1]["mode"] == "offline"
            self.disabled = calls[-1]["mode"] == "disabled"
            self.summary = {}

        def define_metric(self, name, **how):
            calls[-1].setdefault("defined", {})[name] = how

    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append(arguments) or Run())
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    monkeypatch.delenv("RANK", raising=False)
    return calls


@pytest.mark.parametrize(
    ("environment", "mode", "logged_in", "expected"),
    [
        ("disabled", "online", True, "disabled"),  # the user's environment wins
        ("offline", None, True, "offline"),
        (None, "offline", True, "offline"),
        (None, "disabled", False, "disabled"),
        (None, None, True, "online"),
        (None, None, False, "offline"),  # without an account, and without a question
    ],
)
def test_wandb_mode(tmp_path, monkeypatch, wandb_runs, environment, mode, logged_in, expected):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr("wandb.login", lambda prompt: logged_in and not prompt)
    wandb_logger(run_dir=tmp_path, name="a", mode=mode)
    assert wandb_runs[0]["mode"] == expected


def test_the_wandb_run_is_named_after_its_folder_and_written_soon(tmp_path, wandb_runs):
    options = {"project": "p", "entity": "e", "tags": ["a", "b"], "notes": "n"}
    (tmp_path / "run-1").mkdir()
    (logger,) = wandb_logger(run_dir=tmp_path / "run-1", name="shown", **options)
    assert isinstance(logger, RunLogger)
    (arguments,) = wandb_runs
    assert re.fullmatch(r"run-1-[0-9a-f]{8}", arguments["id"])
    wandb_logger(run_dir=tmp_path / "run-1", name="shown", **options)
    assert wandb_runs.pop()["id"] == arguments["id"]  # a resumed run is the same W&B run
    assert arguments["name"] == "shown"
    assert arguments["dir"] == tmp_path / "run-1"
    assert arguments["resume"] == "allow"
    assert {key: arguments[key] for key in options} == options
    assert arguments["settings"].x_transaction_log_flush_interval <= 1
    assert arguments["defined"]["*"]["step_metric"] == "trainer/global_step"


def test_other_ranks_start_no_wandb_run(tmp_path, monkeypatch, wandb_runs):
    monkeypatch.setenv("RANK", "1")
    wandb_logger(run_dir=tmp_path, name="a")
    assert wandb_runs == []


def test_other_ranks_say_nothing(tmp_path):
    said = SimpleNamespace(log_metrics=lambda *_, **__: pytest.fail("rank 1 spoke"))
    log_metrics(trainer_with(said, rank=1), {"a": 1.0})
    log_image(trainer_with(said, rank=1), "samples", Image.new("L", (4, 4)))


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = tensorboard_logger(run_dir=tmp_path, name="any")
    trainer = trainer_with(logger, CSVLogger(tmp_path))
    log_metrics(trainer, {"train/loss": 0.5})
    log_image(trainer, "samples/raw", Image.new("L", (6, 4)))
    finish(trainer, {}, "finished")
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]
    (picture,) = events.Images("samples/raw")
    assert (picture.step, picture.width, picture.height) == (7, 6, 4)


def test_no_logger_is_none(tmp_path):
    assert no_logger(run_dir=tmp_path, name="a") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "code", "preempting"),
    [
        ("finished", 0, False),
        ("failed", 1, False),
        ("stopped", 1, False),
        ("preempted", 1, True),
        ("interrupted", 255, False),
    ],
)
def test_wandb_is_told_how_a_run_ended(tmp_path, status, code, preempting):
    said = []

    class Run:
        offline, disabled = True, False
        summary = SimpleNamespace(update=said.append)

        def mark_preempting(self):
            said.append("preempting")

        def finish(self, exit_code):
            said.append(exit_code)

    run = Run()
    logger = RunLogger(run=run, run_dir=tmp_path, history=History(run))
    finish(trainer_with(logger), {"fid": 3.0}, status)
    assert said == [{"fid": 3.0, "status": status}, *(["preempting"] if preempting else []), code]
