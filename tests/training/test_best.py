from __future__ import annotations

import errno
import json

import pytest
from crashes import is_whole, start, value_of
from lightning.pytorch.callbacks import Callback
from tiny import fit, tiny_module

from denoiselab.training import saving
from denoiselab.training.checkpoint import FOLDER, checkpoints_of, load_checkpoint, step_name, step_of
from denoiselab.training.checkpoint_io import link_atomically
from denoiselab.training.monitor import NoiseLevelValidation
from denoiselab.training.saving import BEST, BEST_NOTE, Checkpoints


def steps_in(run_dir):
    return [step_of(path) for path in checkpoints_of(run_dir / FOLDER)]


def best_of(run_dir):
    """The step of best.ckpt, which best.json must speak of."""
    note = json.loads((run_dir / FOLDER / BEST_NOTE).read_text())
    assert load_checkpoint(run_dir / FOLDER / BEST)["global_step"] == note["step"]
    return note["step"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_of_a_run(tmp_path, asynchronous):
    trainer = start(tmp_path, asynchronous=asynchronous)
    bests = []
    for step in range(1, 13):
        trainer.step(step)
        trainer.checkpoints.settle(trainer)
        bests.append(best_of(tmp_path))
    assert bests == [1, 2, 2, 4, 4, 4, 7, 7, 7, 7, 11, 11]  # value_of; that of step 5 is no number
    assert steps_in(tmp_path) == [11, 12]
    best = tmp_path / FOLDER / BEST
    assert is_whole(best)
    assert best.samefile(tmp_path / FOLDER / step_name(11))
    assert json.loads((tmp_path / FOLDER / BEST_NOTE).read_text()) == {
        "step": 11,
        "metric": "val",
        "value": value_of(11),
        "mode": "min",
        "before": {"step": 7, "value": value_of(7)},
    }
    for step in (13, 14):
        trainer.step(step)
    trainer.checkpoints.settle(trainer)
    assert steps_in(tmp_path) == [13, 14]
    assert is_whole(best)  # its other name is gone


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_best_that_is_written_while_training_goes_on_is_not_missed(tmp_path, asynchronous):
    trainer = start(tmp_path, asynchronous=asynchronous, every=4)
    for step in range(1, 13):  # each is measured
        trainer.step(step)
    trainer.checkpoints.settle(trainer)
    assert best_of(tmp_path) == 4


def test_the_greatest_may_be_the_best(tmp_path):
    trainer = start(tmp_path, best_mode="max")
    for step in (4, 3, 2):
        trainer.step(step)
    assert best_of(tmp_path) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_the_best(tmp_path, monkeypatch, value):
    trainer = start(tmp_path)
    monkeypatch.setattr("crashes.value_of", lambda step: value if step == 1 else 5.0)
    trainer.step(1)
    assert not (tmp_path / FOLDER / BEST).exists()
    trainer.step(2)
    assert best_of(tmp_path) == 2


def test_only_steps_that_are_both_measured_and_saved_count(tmp_path):
    trainer = start(tmp_path, every=2)
    trainer.step(1)  # measured, not saved
    assert not (tmp_path / FOLDER / BEST).exists()
    trainer.global_step = 2  # saved, not measured: the number is of step 1
    trainer.checkpoints.on_train_batch_end(trainer)
    trainer.checkpoints.on_validation_end(trainer)
    assert not (tmp_path / FOLDER / BEST).exists()
    trainer.global_step = 4  # measured before it is saved
    trainer.validation.latest = {"val": 5.0}
    trainer.checkpoints.on_train_batch_end(trainer)
    assert best_of(tmp_path) == 4


def test_the_best_is_taken_over_by_the_next_start(tmp_path):
    trainer = start(tmp_path)
    for step in (3, 4, 5):
        trainer.step(step)
    trainer = start(tmp_path)
    trainer.step(6)  # better than 5, worse than 4
    assert best_of(tmp_path) == 4
    trainer.step(7)
    assert best_of(tmp_path) == 7


def test_a_step_that_is_validated_only_when_the_run_goes_on(tmp_path):
    trainer = start(tmp_path)
    trainer.step(3)
    trainer.global_step = 4
    trainer.checkpoints.save(trainer)  # and stopped before validation
    trainer = start(tmp_path)
    trainer.ckpt_path = tmp_path / FOLDER / step_name(4)
    trainer.checkpoints.on_load_checkpoint(trainer, None, {"global_step": 4})
    trainer.validation.latest = {"val": value_of(4)}
    trainer.checkpoints.on_train_start(trainer)
    assert best_of(tmp_path) == 4


def test_a_crash_between_the_note_and_the_best_is_mended(tmp_path, monkeypatch):
    trainer = start(tmp_path)
    trainer.step(1)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "link_atomically", lambda source, path: None)
        trainer.step(2)
    assert load_checkpoint(tmp_path / FOLDER / BEST)["global_step"] == 1
    trainer = start(tmp_path)
    assert best_of(tmp_path) == 2
    trainer.step(3)  # worse than 2, better than 1
    assert best_of(tmp_path) == 2


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b'{"step": 2}',
        b"\xff",
        b'{"step": 99, "metric": "val", "value": 0.1, "mode": "min"}',
        b'{"step": "../x", "metric": "val", "value": 0.1, "mode": "min"}',
        b'{"step": 2, "metric": "val", "value": NaN, "mode": "min"}',
        b'{"step": Infinity, "metric": "val", "value": 0.1, "mode": "min"}',
        b'{"step": 2, "metric": "val", "value": 1' + b"0" * 400 + b', "mode": "min"}',
        b'{"step": 2, "metric": "val", "value": 0.1, "mode": "max"}',
        b'{"step": 2, "metric": "' + b"\\n" * 10_000 + b'", "value": 0.1, "mode": "max"}',
        b"[" * 100_000,
        b'{"step": 2, "metric": "other", "value": 0.1, "mode": "min"}',
    ],
)
def test_a_note_that_does_not_fit_begins_the_best_anew(tmp_path, caplog, note):
    trainer = start(tmp_path)
    trainer.step(2)
    (tmp_path / FOLDER / BEST_NOTE).write_bytes(note)
    trainer = start(tmp_path)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(str(tmp_path / FOLDER / BEST_NOTE))
    assert "\n" not in caplog.messages[0]
    assert len(caplog.messages[0]) < 1000
    trainer.step(3)
    assert best_of(tmp_path) == 3


def test_a_best_that_cannot_be_written_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path)

    def refuse(path, write, check=None):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_atomically", refuse)
        trainer.step(1)
    assert caplog.messages == [f"checkpoint={tmp_path / FOLDER / BEST}: could not be written (Disk quota exceeded)"]
    assert trainer.checkpoints.last_failure is None
    assert steps_in(tmp_path) == [1]


def no_best(source, target):
    if target.name == BEST:
        raise OSError(errno.ENOSPC, "No space left on device")
    link_atomically(source, target)


@pytest.mark.parametrize("again", [False, True])
def test_a_best_that_could_not_be_linked_is_kept_until_it_is(tmp_path, monkeypatch, again):
    trainer = start(tmp_path)
    for step in (1, 2, 3):
        trainer.step(step)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "link_atomically", no_best)
        for step in (4, 8, 9, 10):  # the best, and three worse ones
            trainer.step(step)
        assert load_checkpoint(tmp_path / FOLDER / BEST)["global_step"] == 2
        assert steps_in(tmp_path) == [4, 9, 10]
        if again:
            trainer = start(tmp_path)
            trainer.step(12)
            assert steps_in(tmp_path) == [4, 10, 12]
    if not again:
        trainer.step(12)  # the same process tries again by itself
        assert best_of(tmp_path) == 4
        assert steps_in(tmp_path) == [10, 12]
    trainer = start(tmp_path)
    assert best_of(tmp_path) == 4
    trainer.step(13)
    assert best_of(tmp_path) == 4
    assert is_whole(tmp_path / FOLDER / BEST)


def test_the_best_before_counts_where_the_next_is_lost(tmp_path, monkeypatch, caplog):
    trainer = start(tmp_path)
    trainer.step(2)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "link_atomically", no_best)
        trainer.step(4)
    (tmp_path / FOLDER / step_name(4)).write_bytes(b"damaged")
    trainer = start(tmp_path)
    assert f"{tmp_path / FOLDER / BEST_NOTE}: is of step 4, and its checkpoint is gone" in caplog.messages
    trainer.step(12)  # worse than that of step 2
    assert load_checkpoint(tmp_path / FOLDER / BEST)["global_step"] == 2
    trainer.step(6)  # better
    assert best_of(tmp_path) == 6


def test_the_best_by_validation_of_a_real_run(tmp_path):
    values = {}

    class Note(Callback):
        def on_validation_end(self, trainer, module):
            values[trainer.global_step] = validation.latest["val/x0_mse"]

    validation = NoiseLevelValidation(log_snrs=[-2.0, 0.0, 2.0])
    checkpoints = Checkpoints(every=2, best="val/x0_mse")
    fit(tiny_module(), tmp_path, steps=6, val_every=2, callbacks=[validation, Note(), checkpoints])
    assert sorted(values) == [2, 4, 6]
    assert best_of(tmp_path) == min(values, key=values.get)
    assert json.loads((tmp_path / FOLDER / BEST_NOTE).read_text())["value"] == min(values.values())


def test_a_best_that_nothing_measures_is_warned_of(tmp_path, caplog):
    fit(tiny_module(), tmp_path, steps=2, callbacks=[Checkpoints(every=1, best="val/x0_mes")])
    assert "best=val/x0_mes: nothing has measured it, so there is no new best.ckpt" in caplog.messages
