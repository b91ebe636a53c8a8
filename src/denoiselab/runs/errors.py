"""The ways in which a command ends early on purpose."""

from __future__ import annotations

import signal

REQUEUE = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 128 + signal.SIGINT  # exit code: as shells say it


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: key, value and what is allowed. Exit code 2."""


class RankError(RuntimeError):
    """A process of a job failed; the message is the first cause. Exit code 1."""


class Stopped(BaseException):  # no error, and like KeyboardInterrupt nothing for `except Exception`
    """A signal stopped a run, which can go on. Exit code 75 (requeue me), or 130 after Ctrl-C.

    Args:
        number: of the signal.
        message: what was saved, and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(int(number), message)  # all arguments: it is sent from process to process
        self.number, self.name, self.message = int(number), signal.Signals(number).name, message
        self.code = INTERRUPTED if number == signal.SIGINT else REQUEUE
        self.status = "interrupted" if number == signal.SIGINT else "preempted"  # of the run

    def __str__(self) -> str:
        return f"stopped by {self.name}" + (f"; {self.message}" if self.message else "")
