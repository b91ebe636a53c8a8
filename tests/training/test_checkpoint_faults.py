"""Faults while checkpoints are written: what is on the disk afterwards must always be enough to go on.

The slow test injects each fault many times and prints how many of them were survived.
"""

from __future__ import annotations

import errno
import os

import pytest
import torch
from crashes import content_of
from faults import (
    damage,
    fail_each_operation,
    fill_the_disk,
    flips,
    kill_in_rounds,
    make_read_only,
    record,
    small_disk,
    truncations,
    unplug_everywhere,
)

from denoiselab.training import checkpoint_io, saving
from denoiselab.training.checkpoint import FOLDER, newest_checkpoint, step_name
from denoiselab.training.checkpoint_io import write_checkpoint


@pytest.fixture
def quick_disk(monkeypatch):
    """Nothing really waits for the disk, where no power is cut or the cut is modelled."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_a_killed_process_costs_nothing(tmp_path):
    count, _, steps = kill_in_rounds(tmp_path, rounds=20)
    assert count.lost == []
    assert count.injected == 20
    assert steps >= 20


@pytest.mark.parametrize(("steps", "best"), [(3, False), (2, True)])
def test_a_power_cut_costs_nothing(tmp_path, monkeypatch, quick_disk, steps, best):
    log, returned = record(tmp_path / "run", monkeypatch, steps, size=20, best="val" if best else None)
    assert {kind for kind, *_ in log} == {"name", "write", "sync", "rename"} | ({"gone"} if steps > 2 else set())
    count, states = unplug_everywhere(tmp_path, log, returned, best)
    assert count.lost == []
    assert count.injected > 300
    assert states > 10


def in_place(checkpoint, path):
    with checkpoint_io.open(path, "wb") as file:
        torch.save(checkpoint, file)
        os.fsync(file.fileno())
    checkpoint_io.sync_folder(path.parent)


def unsynced(path, write, check=None):
    """As `write_atomically`, without the fsync of the file."""
    partial = checkpoint_io._partial(path)
    with checkpoint_io.open(partial, "xb") as file:
        write(file)
    os.replace(partial, path)
    checkpoint_io.sync_folder(path.parent)


MUTATIONS = {
    "no fsync of the file": (checkpoint_io, "write_atomically", unsynced),
    "no fsync of the folder": (checkpoint_io, "sync_folder", lambda folder: None),
    "written in place": (checkpoint_io, "write_checkpoint", in_place),
    "the best copied in place": (
        saving,
        "link_atomically",
        lambda source, path: checkpoint_io.open(path, "wb").write(source.read_bytes()),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_model_of_a_power_cut_finds_what_is_left_out(tmp_path, monkeypatch, quick_disk, mutation):
    best = "best" in mutation
    with monkeypatch.context() as patch:
        patch.setattr(*MUTATIONS[mutation])
        log, returned = record(tmp_path / "run", patch, 2, size=20, best="val" if best else None)
    count, _ = unplug_everywhere(tmp_path, log, returned, best, until_lost=True)
    assert count.lost


def test_any_operation_may_fail(tmp_path, monkeypatch, quick_disk):
    count, failed = fail_each_operation(tmp_path, monkeypatch, codes=(errno.ENOSPC,))
    assert count.lost == []
    assert count.injected > failed > 10


def test_a_full_disk(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 512) as disk:
        count = fill_the_disk(disk, monkeypatch, rounds=8)
    assert count.lost == []
    assert count.injected == 8


def test_a_read_only_disk(tmp_path):
    with small_disk(tmp_path / "disk", 512) as disk:
        count = make_read_only(disk, rounds=2)
    assert count.lost == []


@pytest.mark.parametrize("damages", [truncations(37), flips(101)], ids=["truncated", "a flipped bit"])
def test_damaged_files(tmp_path, damages):
    count, refused = damage(tmp_path, damages)
    assert count.lost == []
    assert count.injected > 50
    assert refused > count.injected / 3


def test_every_truncated_file_is_refused(tmp_path):
    count, refused = damage(tmp_path, truncations(50))
    assert refused == count.injected


def test_a_damaged_file_is_warned_of(tmp_path, caplog):
    folder = tmp_path / FOLDER
    for step in (1, 2, 3):
        write_checkpoint(content_of(step), folder / step_name(step))
    for step in (2, 3):
        os.truncate(folder / step_name(step), 1000)
    assert newest_checkpoint(tmp_path) == folder / step_name(1)
    assert len(caplog.messages) == 2
    for step, line in zip((3, 2), caplog.messages, strict=True):
        assert line.startswith(f"checkpoint={folder / step_name(step)}: cannot be read as plain data (")
        assert line.endswith("; step_0000001.ckpt is taken instead")
    os.truncate(folder / step_name(1), 0)
    with pytest.raises(
        ValueError, match=r"has no good checkpoint in checkpoints/; checkpoint=.*step_0000003"
    ) as caught:
        newest_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_many_faults_of_each_kind(tmp_path, monkeypatch, record_property):
    rows = {}
    count, torn, steps = kill_in_rounds(tmp_path / "killed", rounds=200, seed=1)
    assert torn > 0  # or no kill has met a save
    rows[f"SIGKILL during saves ({torn} left a torn file; {steps} steps saved)"] = count
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # from here on nothing has to wait for the disk
    log, returned = record(tmp_path / "recorded", monkeypatch, 5, size=20)
    count, states = unplug_everywhere(tmp_path, log, returned)
    rows[f"power cut after each of {len(log)} operations ({states} distinct states)"] = count
    rows["a system call fails (ENOSPC, EROFS, EIO, EACCES)"], _ = fail_each_operation(tmp_path, monkeypatch)
    rows["truncated at each length"], _ = damage(tmp_path / "cut", truncations(1))
    rows["each bit flipped"], refused = damage(tmp_path / "flipped", flips(1))
    rows[f"  of these refused; the others change nothing: {refused}"] = None
    try:
        with small_disk(tmp_path / "disk", 512) as disk:
            rows["disk full (tmpfs)"] = fill_the_disk(disk, monkeypatch, rounds=100)
            rows["disk read-only (tmpfs)"] = make_read_only(disk, rounds=20)
    except pytest.skip.Exception:
        rows["disk full, read-only: no tmpfs here"] = None
    table = [f"{'fault':72}{'injected':>10}{'survived':>10}{'lost':>6}"]
    for name, row in rows.items():
        numbers = "" if row is None else f"{row.injected:10,}{row.injected - len(row.lost):10,}{len(row.lost):6}"
        table.append(f"{name:72}{numbers}")
    record_property("table", "\n".join(table))
    assert {name: row.lost for name, row in rows.items() if row is not None and row.lost} == {}
