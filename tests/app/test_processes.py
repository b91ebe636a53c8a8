from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from denoiselab.app.processes import choose_devices, run_processes
from denoiselab.runs.errors import ConfigError, RankError


def meet(number, factor=1):
    """The sum over the ranks, and where we are."""
    total = torch.tensor(float(number * factor))
    size = 1
    if dist.is_initialized():
        total *= dist.get_rank() + 1
        dist.all_reduce(total)
        size = dist.get_world_size()
    return {"total": total, "size": size, "pid": os.getpid(), "threads": torch.get_num_threads()}


def fail(kind, note):
    """Rank 1 ends while rank 0 waits for it, and notes when."""
    if dist.get_rank() == 1:
        time.sleep(0.5)  # rank 0 is waiting
        Path(note).write_text(str(time.time()))
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the cause\nand much more on the next line")
    dist.all_reduce(torch.zeros(1))


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_this_one():
    found = run_processes(meet, (3,), 1, "cpu", ready=(5,))
    assert (found["total"].item(), found["size"], found["pid"]) == (15, 1, os.getpid())
    assert not dist.is_initialized()


@pytest.mark.slow
def test_two_processes_meet_and_the_first_answers(capfd):
    found = run_processes(meet, (3,), 2, "cpu", ready=(5,))  # what is ready here is not sent
    assert (found["total"].item(), found["size"], found["threads"]) == (9, 2, int(os.environ["OMP_NUM_THREADS"]))
    assert found["pid"] != os.getpid()
    assert capfd.readouterr() == ("", "")


def seconds_since(note):
    return time.time() - float(note.read_text())


def test_a_rank_that_raises_ends_the_job_with_its_cause(tmp_path, capfd):
    with pytest.raises(RankError) as caught:
        run_processes(fail, ("raised", str(tmp_path / "note")), 2, "cpu")
    assert str(caught.value) == "rank 1 failed: ValueError: the cause and much more on the next line"
    assert seconds_since(tmp_path / "note") < 60
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tmp_path):
    with pytest.raises(RankError, match="rank 1 failed: .*SIGKILL"):
        run_processes(fail, ("killed", str(tmp_path / "note")), 2, "cpu")
    assert seconds_since(tmp_path / "note") < 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["meet", "raised"])
def test_a_launcher_from_outside(kind, tmp_path):
    call = "meet, (3,)" if kind == "meet" else f"fail, ('raised', {str(tmp_path / 'note')!r})"
    (tmp_path / "job.py").write_text(
        "import os, pathlib, sys\n"
        "from denoiselab.app.processes import run_processes\n"
        "from denoiselab.runs.errors import RankError\n"
        "from test_processes import fail, meet\n"
        "try:\n"
        f"    found = run_processes({call}, 1, 'cpu')\n"
        "except RankError as error:\n"
        "    sys.exit(f'error: {error}')\n"
        f"answer = pathlib.Path({str(tmp_path)!r}, 'answer_' + os.environ['RANK'])\n"
        "answer.write_text(str(found and found['total'].item()))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [*launcher, str(tmp_path / "job.py")], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if kind == "meet":
        assert done.returncode == 0, done.stderr
        assert [(tmp_path / f"answer_{rank}").read_text() for rank in (0, 1)] == ["9.0", "None"]
    else:
        assert done.returncode == 1
        assert "error: rank 1 failed: ValueError: the cause\n" in done.stderr
        assert "error: rank 0" not in done.stderr


@pytest.mark.parametrize(
    ("devices", "outside", "expected"),
    [
        (1, {}, 1),
        (4, {}, 4),
        ("auto", {}, 1),
        (1, {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4),
        (2, {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4),
        ("auto", {"LOCAL_RANK": "0", "WORLD_SIZE": "3"}, 3),
    ],
)
def test_how_many_processes(devices, outside, expected, monkeypatch):
    for name, value in outside.items():
        monkeypatch.setenv(name, value)
    assert choose_devices(devices, "cpu") == expected


def test_the_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_devices("auto", "auto") == 4
    assert choose_devices("auto", "cpu") == 1
    assert choose_devices(3, "cuda") == 3
    with pytest.raises(ConfigError, match="^devices=5: this machine has 4 GPUs$"):
        choose_devices(5, "auto")


def test_numbers_that_cannot_be(monkeypatch):
    with pytest.raises(ConfigError, match="^devices=0: must be at least 1"):
        choose_devices(0, "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="^devices=3: the launcher has started 2 processes on this machine$"):
        choose_devices(3, "cpu")
