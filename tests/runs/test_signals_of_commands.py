from __future__ import annotations

import os
import signal

import pytest

from denoiselab.runs.errors import Stopped
from denoiselab.runs.signals import STOPPING, held_back, stopping


@pytest.mark.parametrize("number", sorted(STOPPING))
def test_a_command_is_stopped_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, stopping():
        os.kill(os.getpid(), number)
    assert caught.value.number == number
    assert signal.getsignal(number) == before


def test_what_must_not_be_disturbed_is_finished_first():
    done = []
    with pytest.raises(Stopped) as caught, stopping(), held_back():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        done.append(1)
    assert done == [1]
    assert caught.value.number == signal.SIGTERM  # the first
