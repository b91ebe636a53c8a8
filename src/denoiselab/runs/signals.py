"""The signals that ask a command to stop, before and after there is something that has to be finished first."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from denoiselab.runs.errors import Stopped

STOPPING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})


@contextmanager
def stopping() -> Iterator[None]:
    """Inside, such a signal raises `Stopped` at once, for what handles it better comes later."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back(numbers: Collection[signal.Signals] = STOPPING) -> Iterator[None]:
    """Inside, signals wait until this is over; to be called on the main thread.

    To block them would not do: the system then gives them to another thread, and Python to the handler.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in received:
            signal.raise_signal(again)


@contextmanager
def blocked(numbers: Collection[signal.Signals] = STOPPING) -> Iterator[None]:
    """Inside, signals wait; processes and threads that begin meanwhile never see them.

    Batch systems send signals to every process of a job, also to helpers of libraries that know nothing to do but end.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
