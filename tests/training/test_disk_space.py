from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from crashes import content_of, start

from denoiselab.training import checkpoint_io
from denoiselab.training.checkpoint_io import write_checkpoint
from denoiselab.training.saving import check_space, checkpoint_bytes


def test_room_for_a_run(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 3 * 10**9, 3 * 10**9)
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    folder = tmp_path / "not" / "there"
    check_space(folder, 3 * 10**9)
    with pytest.raises(ValueError, match="need") as caught:
        check_space(folder, 3 * 10**9 + 10**7)
    assert str(caught.value) == f"runs={folder}: has 3 GB free, and checkpoints of this run need 3.01 GB"
    assert asked == [tmp_path, tmp_path]


def test_the_estimate_is_about_what_a_checkpoint_takes(tmp_path):
    network = torch.nn.Linear(300, 300)
    content = content_of(1) | {
        "state_dict": {f"network.{key}": value for key, value in network.state_dict().items()},
        "ema": {name: network.state_dict() for name in ("a", "b")},
        "optimizer_states": [{i: torch.zeros(300, 301) for i in range(2)}],
    }
    content["ema"] = {name: {k: v.clone() for k, v in average.items()} for name, average in content["ema"].items()}
    write_checkpoint(content, tmp_path / "a.ckpt")
    parameters = sum(p.numel() for p in network.parameters())
    estimate = checkpoint_bytes(parameters, averages=2)
    assert estimate <= (tmp_path / "a.ckpt").stat().st_size < 1.02 * estimate
    assert checkpoint_bytes(parameters, averages=0, moments=0) == 4 * parameters


@pytest.mark.parametrize(("best", "copied"), [(None, False), ("val", False), ("val", True)])
def test_no_more_files_than_said_are_there_at_once(tmp_path, monkeypatch, best, copied):
    seen, write = [], checkpoint_io.write_atomically

    def counted(path, write_content, check=None):
        def write_and_count(file):
            write_content(file)
            inodes = {p.stat().st_ino for p in path.parent.iterdir() if ".json" not in p.name}
            seen.append(len(inodes))

        write(path, write_and_count, check)

    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint_io, "write_atomically", counted)
    if copied:
        monkeypatch.setattr(os, "link", no_links)
    trainer = start(tmp_path, keep=3, best=best)
    for step in range(1, 13):
        trainer.step(step)
    assert max(seen) == trainer.checkpoints.most_files


def full(checkpoint, file):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_little_space_is_warned_of(tmp_path, caplog, monkeypatch):
    start(tmp_path, reserve_gb=0.0).step(1)
    assert caplog.messages == []
    trainer = start(tmp_path, reserve_gb=1e9)
    assert len(caplog.messages) == 1  # before anything is trained
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        trainer.step(2)
    said = [message for message in caplog.messages if "GB are left on its disk (reserve_gb=1e+09)" in message]
    assert len(said) == 2  # and before a save that then fails
    assert trainer.checkpoints.last_failure is not None
