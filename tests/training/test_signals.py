"""Signals set a flag; the run saves and stops at the next step boundary, once."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import get_args

import pytest
from lightning.pytorch.callbacks import Callback
from tiny import fit, tiny_module

from denoiselab.runs.errors import Stopped
from denoiselab.runs.signals import STOPPING
from denoiselab.training.checkpoint import FOLDER, checkpoints_of, load_checkpoint
from denoiselab.training.saving import Checkpoints
from denoiselab.training.signals import Name, StopOnSignal, _early, before_training, stoppable


class Sender(Callback):
    """Sends this process signals at the beginning of the n-th micro-batch."""

    def __init__(self, at, *numbers):
        self.at, self.numbers, self.ran = at, numbers, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ran.append(batch_idx)
        if batch_idx == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def stopped(tmp_path, sender, **settings):
    callbacks = [StopOnSignal(signals=["SIGTERM", "SIGUSR1"]), Checkpoints(every=100), sender]
    with pytest.raises(Stopped) as caught:
        fit(tiny_module(), tmp_path, steps=9, callbacks=callbacks, **settings)
    return caught.value, [path.name for path in checkpoints_of(tmp_path / FOLDER)]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda value: str(value)
)
def test_the_step_is_finished_and_saved(tmp_path, number, code):
    before = signal.getsignal(number)
    sender = Sender(2, number)
    stop, saved = stopped(tmp_path, sender)
    assert (stop.number, stop.code, str(stop)) == (number, code, f"stopped by {signal.Signals(number).name}")
    assert sender.ran == [0, 1, 2]
    assert saved == ["step_0000003.ckpt"]
    assert load_checkpoint(tmp_path / FOLDER / saved[0])["global_step"] == 3
    assert signal.getsignal(number) == before


def test_an_accumulated_step_is_finished_first(tmp_path):
    sender = Sender(2, signal.SIGTERM)
    stopped(tmp_path, sender, accumulate=4)
    assert sender.ran == [0, 1, 2, 3]
    sender = Sender(4, signal.SIGTERM)
    _, saved = stopped(tmp_path / "later", sender, accumulate=4)
    assert sender.ran == list(range(8))
    assert saved == ["step_0000002.ckpt"]


def test_many_signals_stop_once(tmp_path):
    stop, saved = stopped(tmp_path, Sender(1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM))
    assert stop.name == "SIGUSR1"  # the first
    assert saved == ["step_0000002.ckpt"]


def test_only_the_configured_signals_are_taken(tmp_path):
    got = []
    before = signal.signal(signal.SIGUSR2, lambda *_: got.append("mine"))
    try:
        fit(tiny_module(), tmp_path, callbacks=[StopOnSignal(signals=["SIGTERM"]), Sender(1, signal.SIGUSR2)])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert got == ["mine"]


def test_a_second_ctrl_c_stops_at_once_but_not_the_same_one_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    callback = StopOnSignal(signals=[])
    callback._note(signal.SIGINT, None)
    now[0] += 0.1
    callback._note(signal.SIGINT, None)  # the terminal and the parent process both told us
    assert callback.received == signal.SIGINT
    now[0] += 5
    with pytest.raises(Stopped):
        callback._note(signal.SIGINT, None)


def test_an_impatient_ctrl_c_is_not_swallowed_as_an_error():
    assert not issubclass(Stopped, Exception)


def test_what_takes_long_after_a_save_is_stopped_at_once(tmp_path):
    callback, saves = StopOnSignal(signals=["SIGTERM"]), Checkpoints(every=100)
    seen = []

    class Long(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                with stoppable(trainer):
                    os.kill(os.getpid(), signal.SIGTERM)
                    seen.append("went on")

    with pytest.raises(Stopped):
        fit(tiny_module(), tmp_path, steps=9, callbacks=[callback, saves, Long()])
    assert seen == []
    assert [path.name for path in checkpoints_of(tmp_path / FOLDER)] == ["step_0000002.ckpt"]
    assert not callback.at_once


def test_what_takes_long_does_not_begin_after_a_signal(tmp_path):
    """The signal came while something else took long, and the step boundary at which it would be obeyed is far."""

    class Long(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                with stoppable(trainer):
                    pytest.fail("went on")

    with pytest.raises(Stopped):  # listed before the signals, so that it is not the step boundary that stops
        fit(
            tiny_module(),
            tmp_path,
            steps=9,
            callbacks=[Long(), StopOnSignal(signals=["SIGTERM"]), Checkpoints(every=100)],
        )
    assert [path.name for path in checkpoints_of(tmp_path / FOLDER)] == ["step_0000002.ckpt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_before_training_stops_it_when_it_begins(tmp_path, number):
    callbacks, sender = [StopOnSignal(signals=["SIGTERM"]), Checkpoints(every=100)], Sender(0)
    before = signal.getsignal(number)
    with before_training(callbacks):
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as caught:
            fit(tiny_module(), tmp_path, callbacks=[*callbacks, sender])
    assert caught.value.number == number
    assert sender.ran == []
    assert signal.getsignal(number) == before
    assert not _early


def test_a_failure_gives_the_signals_back(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise ValueError("trouble")

    before = {number: signal.getsignal(number) for number in STOPPING}
    with pytest.raises(ValueError, match="trouble"):
        fit(tiny_module(), tmp_path, callbacks=[StopOnSignal(signals=["SIGTERM", "SIGUSR1"]), Fails()])
    assert {number: signal.getsignal(number) for number in STOPPING} == before


def test_lightning_answers_no_signals(tmp_path):
    """Its handlers call collectives from inside a handler, and requeue Slurm's jobs from there."""
    seen = []

    class Look(Callback):
        def on_train_start(self, *_):
            seen.extend(signal.getsignal(number) for number in STOPPING)

    before = [signal.getsignal(number) for number in STOPPING]
    fit(tiny_module(), tmp_path, callbacks=[Look()])
    assert seen == before


def test_the_end_of_a_run_can_be_stopped_once_it_is_saved(tmp_path):
    class Measuring(Callback):
        def on_train_end(self, trainer, module):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")

    with pytest.raises(Stopped):
        fit(tiny_module(), tmp_path, callbacks=[StopOnSignal(signals=["SIGTERM"]), Checkpoints(every=100), Measuring()])
    assert [path.name for path in checkpoints_of(tmp_path / FOLDER)] == ["step_0000004.ckpt"]


def test_a_late_look_comes_so_many_steps_later(monkeypatch):
    """On a GPU the flags of a step are looked at some steps later, whoever has received the signal."""
    reduced = []

    def all_reduce(flag, op, group, async_op):
        reduced.append(int(flag))
        if len(reduced) == 3:
            flag.fill_(int(signal.SIGUSR1))  # another rank had received it
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    callback = StopOnSignal(signals=[])
    callback._group, callback._lag = object(), 4
    assert [callback._agreed() for _ in range(7)] == [0, 0, 0, 0, 0, 0, signal.SIGUSR1]
    assert len(reduced) == 7


def test_what_ends_a_job_is_always_listened_to():
    assert StopOnSignal(signals=[]).signals == [signal.SIGTERM, signal.SIGINT]
    offered = {signal.Signals[name] for name in get_args(Name)}
    assert offered == STOPPING  # what the launcher of several ranks hands on
