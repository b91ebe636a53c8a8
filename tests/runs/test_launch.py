from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from denoiselab.runs.errors import RankError
from denoiselab.runs.launch import launch, launched_from_outside
from denoiselab.runs.signals import STOPPING


def meet(folder: str, factor: int) -> None:
    """Write the sum over the ranks into a file of one's own."""
    dist.init_process_group("gloo")
    total = torch.tensor(float(factor * (dist.get_rank() + 1)))
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    text = " ".join([f"{total:g}", *(os.environ[name] for name in names)])
    (Path(folder) / str(dist.get_rank())).write_text(text)
    dist.destroy_process_group()


@record
def fail(rank: int) -> None:
    """One rank fails while the other waits for it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError("the cause\nand much more on the next line")
    dist.barrier()


@record
def killed() -> None:
    """The first rank is killed from outside."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        os.kill(os.getpid(), 9)
    dist.barrier()


def test_the_ranks_meet_and_the_parent_waits(tmp_path):
    launch(meet, (str(tmp_path), 10), 2)
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in (0, 1))
    assert first[:4] == ["30", "0", "0", "2"]
    assert second[:4] == ["30", "1", "1", "2"]
    assert first[4] == second[4]  # the port
    assert "RANK" not in os.environ


def obey(folder: str) -> None:
    """Let the signals through when it is ready for them, and wait for one."""
    got = []
    for number in STOPPING:
        signal.signal(number, lambda n, _: got.append(n))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    end = time.monotonic() + 60
    while not got and time.monotonic() < end:
        time.sleep(0.05)
    (Path(folder) / os.environ["RANK"]).write_text(" ".join(signal.Signals(n).name for n in got))


@pytest.mark.parametrize("seconds", [0.1, 2.0])  # before there are any processes, and while they import
def test_a_signal_is_handed_on_however_early_it_comes(tmp_path, monkeypatch, seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr(resource_tracker, "ensure_running", timer.start)  # what the launcher does first
    launch(obey, (str(tmp_path),), 2, hand_on=tmp_path / "asked")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]
    assert (tmp_path / "asked").read_text() == "SIGUSR1\n"


def test_a_failing_rank_names_its_cause():
    with pytest.raises(RankError) as caught:
        launch(fail, (1,), 2)
    assert str(caught.value) == "rank 1 failed: ValueError: the cause and much more on the next line"


@pytest.mark.slow
def test_a_killed_rank_is_named():
    with pytest.raises(RankError, match="rank 0 failed: .*SIGKILL"):
        launch(killed, (), 2)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
    ],
)
def test_launched_from_outside(monkeypatch, environment, expected):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_from_outside() is expected
