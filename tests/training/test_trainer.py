from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from denoiselab.training.checkpoint_io import AtomicCheckpointIO
from denoiselab.training.saving import Checkpoints
from denoiselab.training.trainer import TrainerSettings, free_cores

GOOD = {"accelerator": "cpu", "devices": 1, "max_steps": 10, "val_every": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices=0: must be at least 1"),
        ({"num_nodes": 0}, "num_nodes=0: must be at least 1"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1"),
        ({"max_steps": -1}, "max_steps=-1: must be at least 1"),  # Lightning's "for ever"
        ({"accumulate": 0}, "accumulate=0: must be at least 1"),
        ({"val_every": 0}, "val_every=0: must be at least 1"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0: must be positive, or null for none"),
        ({"gradient_clip": float("nan")}, "gradient_clip=nan: must be positive, or null for none"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainerSettings(**(GOOD | changes))


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        (0, {"accelerator": "auto", "devices": "auto"}, ("cpu", 1)),
        (0, {"accelerator": "cpu", "devices": "auto"}, ("cpu", 1)),
        (4, {"accelerator": "auto", "devices": "auto"}, ("gpu", 4)),
        (4, {"accelerator": "gpu", "devices": 2}, ("gpu", 2)),
        (4, {"accelerator": "cpu", "devices": 8}, ("cpu", 8)),
        (0, {"accelerator": "gpu", "devices": 1}, "accelerator=gpu: this machine has no GPU; use trainer=cpu"),
        (2, {"accelerator": "auto", "devices": 3}, "devices=3: this machine has 2 GPUs"),
    ],
)
def test_where_to_train(monkeypatch, gpus, asked, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            TrainerSettings(**(GOOD | asked))
    else:
        settings = TrainerSettings(**(GOOD | asked))
        assert (settings.accelerator, settings.devices) == expected


def test_world_size_counts_all_machines():
    assert TrainerSettings(**(GOOD | {"devices": 4, "num_nodes": 2})).world_size == 8


def test_the_trainer_is_the_one_that_was_asked_for(tmp_path):
    settings = TrainerSettings(**(GOOD | {"accumulate": 3, "gradient_clip": 0.5, "precision": "bf16-mixed"}))
    trainer = settings.build(tmp_path, [], [Checkpoints(every=2)])
    assert trainer.max_steps == 10
    assert trainer.accumulate_grad_batches == 3
    assert trainer.gradient_clip_val == 0.5
    assert trainer.precision == "bf16-mixed"
    assert trainer.val_check_interval == 15  # counted in batches
    assert trainer.default_root_dir == str(tmp_path)
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert [type(c).__name__ for c in trainer.callbacks if "Checkpoint" in type(c).__name__] == ["Checkpoints"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose affinity mask leaves 8 cores, all idle unless told otherwise, and a cgroup file to write."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def idle(*shares):
        """What part of the time each core is idle."""
        readings = iter(
            [[1000] * 8, [1000 + round(25 * share) for share in shares]]
        )  # 25 ticks in a quarter of a second
        monkeypatch.setattr(
            "denoiselab.training.trainer._idle", lambda allowed: dict(zip(sorted(allowed), next(readings), strict=True))
        )

    idle(*[1.0] * 8)
    return SimpleNamespace(cgroup=tmp_path / "cpu.max", idle=idle)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        (None, 8),  # no such file
        ("max 100000\n", 8),  # no quota
        ("400000 100000\n", 4),
        ("150000 100000\n", 2),  # part of a core is a core
        ("10000 100000\n", 1),
        ("9900000 100000\n", 8),  # more than the mask allows
        ("", 8),
    ],
)
def test_the_quota_of_the_container_counts(machine, quota, cores):
    if quota is not None:
        machine.cgroup.write_text(quota)
    assert free_cores(cgroup=machine.cgroup) == cores


@pytest.mark.parametrize(("given", "cores"), [("3", 3), ("64", 64), ("0", 8), ("", 8), ("4,2", 8)])
def test_omp_num_threads_wins(machine, monkeypatch, given, cores):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert free_cores(cgroup=machine.cgroup) == cores


@pytest.mark.parametrize(
    ("idle", "cores"),
    [
        ([1, 1, 1, 0, 0, 0, 0, 0], 3),
        ([0] * 8, 1),  # one thread at least
        ([0.96] * 8, 8),  # a quiet machine is never quite idle
        ([1.2] * 8, 8),  # ticks are counted coarsely
        ([0.5, 0.5, 0.48, 0, 0, 0, 0, 0], 1),
    ],
)
def test_busy_cores_are_left_alone(machine, idle, cores):
    machine.idle(*idle)
    assert free_cores(cgroup=machine.cgroup) == cores


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (2, 4), (3, 2), (16, 1)])
def test_processes_share_the_cores(machine, processes, threads):
    assert free_cores(processes, machine.cgroup) == threads
    asked = TrainerSettings(**(GOOD | {"devices": processes, "threads": 5}))
    assert asked.choose_threads() == 5


def test_a_run_goes_on_with_the_threads_that_it_had(machine, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert free_cores(cgroup=machine.cgroup, then=4) == 4  # else sums would be rounded otherwise
    for odd in (9, 0, -1, True, "4", 4.0, None, [4]):  # more than there are, or no number
        machine.idle(1, 0, 0, 0, 0, 0, 0, 0)
        assert free_cores(cgroup=machine.cgroup, then=odd) == 1
    machine.idle(1, 0, 0, 0, 0, 0, 0, 0)
    assert free_cores(2, machine.cgroup, then=5) == 1
    assert TrainerSettings(**(GOOD | {"threads": 5})).choose_threads(4) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert free_cores(cgroup=machine.cgroup, then=4) == 3


def test_a_machine_without_proc_counts_its_cores(machine, monkeypatch):
    def no_proc(allowed):
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr("denoiselab.training.trainer._idle", no_proc)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert free_cores(cgroup=machine.cgroup) == 6


def test_no_machine_has_so_many_processes():
    with pytest.raises(ValueError, match="devices=1000000: this machine has"):
        TrainerSettings(accelerator="cpu", devices=10**6, max_steps=1, val_every=1)
