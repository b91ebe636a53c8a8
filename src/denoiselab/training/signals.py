"""Signals that ask a run to stop: they only set a flag, and the ranks agree on the step after which they stop.

Batch systems send a signal some time before they end a job. Saving inside a handler hangs (it interrupts whatever holds a
lock or waits in a collective), so the handler notes the signal, and the work is done at the next step boundary: one
checkpoint, by all ranks at the same step. The flags of all ranks are reduced on the host; on GPUs, where the host runs
ahead, a flag is looked at some steps later, always the same number, so that nobody waits and all ranks act at one step.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from denoiselab.runs.errors import Stopped
from denoiselab.runs.launch import PATIENCE
from denoiselab.runs.signals import STOPPING
from denoiselab.training.saving import save_now

LAG = 8  # steps, on a GPU
IMPATIENCE = 2.0  # seconds: a second Ctrl-C after this long stops at once

_early: list[signal.Signals] = []  # received before training began, by one of several processes

Name = Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"]


class StopOnSignal(Callback):
    """Saves and stops at the next step boundary after a signal; while the end of a run is measured, at once.

    SIGTERM and SIGINT (Ctrl-C) are always among them; a second Ctrl-C stops at once, without saving. List it after the
    monitor, which has to count the step, and before callbacks that take time.

    Args:
        signals: by name; "SIGUSR1" is what `sbatch --signal=USR1@120` asks for.
    """

    def __init__(self, *, signals: list[Name]) -> None:
        self.signals = [signal.Signals[name] for name in dict.fromkeys([*signals, "SIGTERM", "SIGINT"])]
        self.received: signal.Signals | None = None
        self.at_once = False  # all is saved: nothing has to be waited for
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._lag = 0
        self._queue: deque[tuple[Tensor, Any]] = deque()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the signals over; stop if there was one already."""
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._lag = LAG if pl_module.device.type == "cuda" else 0
        self.listen()
        self.received = self.received or next(iter(_early), None)
        early = torch.tensor(int(self.received or 0))
        if self._group is not None:
            dist.all_reduce(early, op=dist.ReduceOp.MAX, group=self._group)
        if early:
            raise Stopped(int(early))

    def listen(self) -> None:
        """Install the handlers."""
        self._before = {number: signal.signal(number, self._note) for number in self.signals}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, error: Any) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.received is not None and number == signal.SIGINT and now - self._since > IMPATIENCE
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
        if self.at_once or again:
            self.at_once = False  # one is enough
            raise Stopped(self.received)

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        """Save and stop if the ranks have agreed to."""
        if (rest[-1] + 1) % trainer.accumulate_grad_batches:
            return
        number = self._agreed()
        if number:
            self.received = signal.Signals(number)
            save_now(trainer)
            raise Stopped(self.received)

    def _agreed(self) -> int:
        """The signal that some rank had received `lag` steps ago, or 0; the same on every rank."""
        number = int(self.received or 0)
        if self._group is None:
            return number
        flag = torch.tensor(number)
        self._queue.append((flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)))
        if len(self._queue) <= self._lag:
            return 0
        flag, work = self._queue.popleft()
        work.wait()
        return int(flag)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save; what follows the last step can be stopped at any time."""
        save_now(trainer)
        self.look_now()

    def look_now(self) -> None:
        """From here on a signal stops at once, as does one that was received before; to be called on all ranks.

        Raises:
            Stopped: if there was one on any rank.
        """
        lag, self._lag = self._lag, 0
        waiting = [self._agreed() for _ in range(len(self._queue) + 1)]  # all that the ranks have not looked at yet
        self._lag = lag
        self.at_once = not any(waiting)
        if any(waiting):
            raise Stopped(max(waiting))


@contextmanager
def before_training(callbacks: Iterable[Callback]) -> Iterator[None]:
    """Inside, one of several processes notes the signals that stop a run until its `StopOnSignal` takes them over.

    All of them stop when training begins: one that left earlier would be waited for.

    Args:
        callbacks: of the run; a `StopOnSignal` among them says which signals.
    """
    numbers = [number for callback in callbacks if isinstance(callback, StopOnSignal) for number in callback.signals]
    before = {number: signal.signal(number, lambda n, _: _early.append(signal.Signals(n))) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # until now they have waited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        _early.clear()


@contextmanager
def stoppable(trainer: lightning.Trainer) -> Iterator[None]:
    """Save; inside, a signal stops at once: it would be a long time until the next step boundary, and nothing is lost."""
    save_now(trainer)
    callbacks = [c for c in trainer.callbacks if isinstance(c, StopOnSignal)]  # type: ignore[attr-defined]
    before = [c.at_once for c in callbacks]
    for callback in callbacks:
        callback.look_now()
    try:
        yield
    finally:
        for callback, was in zip(callbacks, before, strict=True):
            callback.at_once = was
