from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from crashes import content_of, is_whole, start
from lightning.pytorch.callbacks import Callback
from tiny import equal, fit, tiny_module, weights_of

from denoiselab.training import checkpoint_io, saving
from denoiselab.training.checkpoint import (
    FOLDER,
    checkpoints_of,
    newest_checkpoint,
    step_name,
    step_of,
)
from denoiselab.training.checkpoint_io import write_checkpoint
from denoiselab.training.saving import Checkpoints, save_now


def steps_in(run_dir):
    return [step_of(path) for path in checkpoints_of(run_dir / FOLDER)]


@pytest.fixture
def full(monkeypatch):
    """A disk that is full at some steps: `full.update(steps)`."""
    steps, write = set(), checkpoint_io.write_checkpoint

    def write_or_not(checkpoint, path):
        if step_of(path) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", write_or_not)
    return steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0: must be at least 1"),
        ({"every": 5, "keep": 1}, "keep=1: must be at least 2"),
        ({"every": 5, "reserve_gb": -1.0}, "reserve_gb=-1.0: must be at least 0"),
        ({"every": 5, "reserve_gb": float("nan")}, "reserve_gb=nan: must be at least 0"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**arguments)


def test_an_interrupted_save_is_not_taken_for_a_failed_one(tmp_path, monkeypatch):
    def interrupted(checkpoint, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", interrupted)
    trainer = start(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(1)
    trainer.checkpoints.on_exception(trainer)
    assert trainer.checkpoints.last_failure is None


def test_an_interrupted_wait_does_not_forget_what_is_being_written(tmp_path, monkeypatch):
    trainer = start(tmp_path, asynchronous=True)
    trainer.step(1)
    writer = trainer.strategy.checkpoint_io
    running, waited = writer._running, []

    class Interrupted:
        def result(self):
            waited.append(1)
            if len(waited) == 1:
                raise KeyboardInterrupt
            return running.result()

        def done(self):
            return len(waited) > 1

    writer._running = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        trainer.step(2)
    trainer.checkpoints.on_exception(trainer)
    assert len(waited) == 2
    assert is_whole(tmp_path / FOLDER / step_name(1))


# --- when ---


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept(tmp_path, accumulate, asynchronous):
    checkpoints = Checkpoints(every=2, keep=3, asynchronous=asynchronous)
    fit(tiny_module(), tmp_path, steps=7, accumulate=accumulate, callbacks=[checkpoints])
    assert steps_in(tmp_path) == [4, 6, 7]  # the end is saved too
    assert len(list((tmp_path / FOLDER).iterdir())) == 3
    assert checkpoints.last_failure is None


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


def test_a_run_that_is_stopped_is_not_at_its_end(tmp_path):
    fit(tiny_module(), tmp_path, steps=9, callbacks=[Checkpoints(every=2), StopAt(5)])
    assert steps_in(tmp_path) == [2, 4]


def test_a_step_is_written_once(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        checkpoint_io,
        "write_checkpoint",
        lambda checkpoint, path: written.append(step_of(path)) or real(checkpoint, path),
    )
    real = write_checkpoint

    class SaveOften(Callback):
        def on_train_batch_end(self, trainer, *_):
            save_now(trainer)

    fit(tiny_module(), tmp_path, steps=4, callbacks=[SaveOften(), Checkpoints(every=2), SaveOften()])
    assert written == [1, 2, 3, 4]


def test_going_on_from_the_last_step_writes_nothing_again(tmp_path):
    fit(tiny_module(), tmp_path / "run", steps=4, callbacks=[Checkpoints(every=2)])
    last = newest_checkpoint(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in last.parent.iterdir()}
    for run_dir in (tmp_path / "run", tmp_path / "other"):
        fit(tiny_module(), run_dir, steps=4, callbacks=[Checkpoints(every=2)], resume=last)
    assert {path.name: path.stat().st_mtime_ns for path in last.parent.iterdir()} == before
    assert steps_in(tmp_path / "other") == [4]  # another run has to have its own


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_at_the_end_can_be_gone_on_from(tmp_path, asynchronous):
    whole, first, rest = tiny_module(), tiny_module(), tiny_module()
    fit(whole, tmp_path / "whole", steps=6, callbacks=[Checkpoints(every=100)])
    fit(first, tmp_path / "run", steps=3, callbacks=[Checkpoints(every=100, asynchronous=asynchronous)])
    fit(rest, tmp_path / "run", steps=6, callbacks=[Checkpoints(every=100)], resume=newest_checkpoint(tmp_path / "run"))
    assert steps_in(tmp_path / "run") == [3, 6]
    assert equal(weights_of(rest), weights_of(whole))


# --- failures ---


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_is_reported_and_the_run_goes_on(tmp_path, full, caplog, asynchronous):
    full |= {4}
    checkpoints = Checkpoints(every=2, asynchronous=asynchronous)
    trainer = fit(tiny_module(), tmp_path, steps=7, callbacks=[checkpoints])
    assert trainer.global_step == 7
    assert steps_in(tmp_path) == [6, 7]
    line = f"checkpoint={tmp_path / FOLDER / step_name(4)}: could not be written (No space left on device)"
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        f"{line}; the run goes on, and the checkpoints before it stay"
    ]
    assert checkpoints.last_failure is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_whose_end_cannot_be_saved_fails(tmp_path, full, asynchronous):
    full |= {6, 7}
    checkpoints = Checkpoints(every=2, asynchronous=asynchronous)
    with pytest.raises(RuntimeError, match=r"step_0000007\.ckpt: could not be written \(No space left") as caught:
        fit(tiny_module(), tmp_path, steps=7, callbacks=[checkpoints])
    assert str(caught.value) == checkpoints.last_failure
    assert "\n" not in str(caught.value)
    assert steps_in(tmp_path) == [2, 4]


def test_a_step_that_could_not_be_saved_is_tried_again(tmp_path, full):
    trainer = start(tmp_path)
    full |= {1}
    trainer.step(1)
    assert trainer.checkpoints.last_failure is not None
    assert steps_in(tmp_path) == []
    full.clear()
    trainer.checkpoints.save(trainer)
    assert trainer.checkpoints.last_failure is None
    assert steps_in(tmp_path) == [1]


def test_an_exception_lets_the_background_finish(tmp_path):
    trainer = start(tmp_path, asynchronous=True)
    trainer.step(1)
    trainer.checkpoints.on_exception(trainer, None, RuntimeError())
    assert is_whole(tmp_path / FOLDER / step_name(1))
    trainer.checkpoints.on_exception(trainer, None, RuntimeError())  # nothing is pending


def test_save_now_returns_when_the_disk_has_it(tmp_path):
    trainer = start(tmp_path, asynchronous=True)
    trainer.global_step = 5
    save_now(trainer)
    assert is_whole(tmp_path / FOLDER / step_name(5))


def test_a_second_rank_learns_of_a_failure_and_touches_no_file(tmp_path, monkeypatch):
    line = "checkpoint=there: could not be written (No space left on device)"
    trainer = start(tmp_path / "other")
    trainer.is_global_zero, trainer.strategy.broadcast = False, lambda value: line
    for name in ("unlink", "link", "replace"):
        monkeypatch.setattr(os, name, None)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, weights_only: None)
    trainer.step(1)
    assert trainer.checkpoints.last_failure == line
    trainer.max_steps = 1
    with pytest.raises(RuntimeError, match=re.escape(line)):
        trainer.checkpoints.on_train_end(trainer)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_mistake_in_the_program_is_raised_once(tmp_path, monkeypatch, asynchronous):
    trainer = start(tmp_path, asynchronous=asynchronous)
    trainer.step(1)
    trainer.checkpoints.settle(trainer)
    with monkeypatch.context() as patch:
        patch.setattr("crashes.content_of", lambda step, size: {"state": Path("x")})
        trainer.global_step = 2
        with pytest.raises(TypeError, match="names 'pathlib"):
            save_now(trainer)
    trainer.checkpoints.on_exception(trainer)  # has nothing to add
    save_now(trainer)
    assert steps_in(tmp_path) == [1, 2]


def test_a_mistake_in_the_background_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr("crashes.content_of", lambda step, size: {"state": Path("x")})
        trainer.step(1)
        trainer.checkpoints.on_exception(trainer, None, RuntimeError("first"))
    assert len(caplog.messages) == 1
    assert "step_0000001.ckpt: could not be written (checkpoint=" in caplog.messages[0]


def test_a_disk_that_fails_after_a_save_costs_no_run(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path)
    for step in (1, 2):
        trainer.step(step)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        for name in ("checkpoints_of", "_free"):
            patch.setattr(saving, name, stale)
        trainer.step(3)
    assert trainer.checkpoints.last_failure is None
    assert caplog.messages == [f"{tmp_path / FOLDER}: old checkpoints could not be deleted (Stale file handle)"]
    trainer.step(4)
    assert steps_in(tmp_path) == [3, 4]


# --- which are kept ---


def test_nothing_is_deleted_until_enough_newer_ones_are_good(tmp_path, caplog):
    trainer = start(tmp_path)
    for step in (1, 2, 3):
        trainer.step(step)
    assert steps_in(tmp_path) == [2, 3]
    damaged = tmp_path / FOLDER / step_name(3)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    trainer.step(4)
    assert steps_in(tmp_path) == [2, 3, 4]  # 3 does not count
    assert f"checkpoint={damaged}: cannot be read" in caplog.messages[0]
    trainer.step(5)
    assert steps_in(tmp_path) == [4, 5]


def test_a_file_is_read_back_once_in_a_process(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write_checkpoint(content_of(step), tmp_path / FOLDER / step_name(step))
    read = []
    monkeypatch.setattr(saving, "flaw_of", lambda path: read.append(step_of(path)))
    trainer = start(tmp_path, keep=3)
    for step in (4, 5):
        trainer.step(step)
    assert read == [3, 2]  # those of an earlier start; what this one wrote has been read back by the writer
    path = tmp_path / FOLDER / step_name(5)
    os.utime(path, ns=(0, 0))
    trainer.step(6)
    assert read == [3, 2, 5]  # somebody has changed it


def test_going_on_from_an_earlier_step_leaves_later_ones(tmp_path):
    trainer = start(tmp_path)
    for step in (5, 6):
        trainer.step(step)
    trainer = start(tmp_path)
    for step in (3, 4):
        trainer.step(step)
        assert steps_in(tmp_path) == [*range(3, step + 1), 5, 6]
    trainer.step(5)
    assert steps_in(tmp_path) == [4, 5, 6]


def test_what_cannot_be_deleted_is_left(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path)
    for step in (1, 2):
        trainer.step(step)
    unlink = os.unlink

    def refuse(path, **rest):
        if Path(path).name == step_name(1):
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, **rest)

    monkeypatch.setattr(os, "unlink", refuse)
    trainer.step(3)
    assert trainer.checkpoints.last_failure is None
    assert steps_in(tmp_path) == [1, 2, 3]
    assert caplog.messages == [
        f"checkpoint={tmp_path / FOLDER / step_name(1)}: could not be deleted (Permission denied)"
    ]


# --- two ranks ---

TWO_RANKS = """
import errno, os, sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from tiny import TinyData, tiny_module
from denoiselab.training import checkpoint_io
from denoiselab.training.saving import Checkpoints
from denoiselab.training.trainer import TrainerSettings

write = checkpoint_io.write_checkpoint

def full_at_the_end(checkpoint, path):
    if path.name in ("step_0000002.ckpt", "step_0000005.ckpt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    write(checkpoint, path)

checkpoint_io.write_checkpoint = full_at_the_end
failures, checkpoints = [], Checkpoints(every=1, best="val/x0_mse", asynchronous={asynchronous})
settle = checkpoints.settle

def noted(trainer):
    settle(trainer)
    if checkpoints.last_failure and checkpoints.last_failure not in failures:
        failures.append(checkpoints.last_failure)

checkpoints.settle = noted
try:
    settings = TrainerSettings(accelerator="cpu", devices=2, max_steps=5, val_every=100)
    settings.build(Path({run!r}), [], [checkpoints]).fit(tiny_module(), datamodule=TinyData())
except RuntimeError as error:
    failures.append("raised " + str(error))
print(*failures, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_agree_on_what_failed(tmp_path, asynchronous):
    script = TWO_RANKS.format(tests=str(Path(__file__).parent), run=str(tmp_path), asynchronous=asynchronous)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [rank.communicate(timeout=240) for rank in ranks]  # a rank that waits for ever would end here
    second, last = (
        f"checkpoint={tmp_path / FOLDER / step_name(step)}: could not be written (No space left on device)"
        for step in (2, 5)
    )
    for out, err in done:
        lines = [line for line in out.splitlines() if "could not be written" in line]
        assert lines == [second, last, f"raised {last}"], err[-3000:]
    assert steps_in(tmp_path) == [3, 4]
