from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from pathlib import Path

import numpy
import pytest
import torch
from crashes import Recorder, content_of, is_content, is_whole
from tiny import equal, fit, tiny_module, weights_of

from denoiselab.runs import files
from denoiselab.training import checkpoint_io
from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint, step_name, verify
from denoiselab.training.checkpoint_io import (
    AtomicCheckpointIO,
    link_atomically,
    write_atomically,
    write_checkpoint,
)
from denoiselab.training.saving import Checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_written_under_its_name_alone(tmp_path):
    target = tmp_path / "new" / "folders" / step_name(1)
    for content in (torch.arange(3), torch.arange(4)):
        write_checkpoint({"a": content}, target)
    assert torch.equal(torch.load(target, weights_only=True)["a"], torch.arange(4))
    assert names(target.parent) == [step_name(1)]


def test_a_file_and_its_name_are_on_disk_one_after_the_other(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    read = []
    monkeypatch.setattr(checkpoint_io, "read_back", lambda path: read.append((path.name, len(recorder.log))))
    write_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    order = [(kind, *rest[:2]) for kind, *rest in recorder.log if kind != "write"]
    assert order == [
        ("name", ".a.ckpt.partial", 0),
        ("sync", 0),
        ("rename", ".a.ckpt.partial", "a.ckpt"),
        ("sync", None),  # the folder
    ]
    assert read == [(".a.ckpt.partial", len(recorder.log) - 2)]  # after the fsync, before the rename


def test_a_new_folder_is_on_disk_too(tmp_path, monkeypatch):
    synced = []
    for module in (checkpoint_io, files):
        monkeypatch.setattr(module, "sync_folder", synced.append)
    for _ in range(2):
        write_checkpoint({"a": 1}, tmp_path / "new" / "a.ckpt")
    assert synced == [tmp_path, tmp_path / "new", tmp_path / "new"]


def half_then_full(checkpoint, file):
    file.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_broken(checkpoint, file):
    file.write(b"half a checkpoint")
    raise RuntimeError("PytorchStreamWriter failed writing file\nand more")


def half_then_hidden(checkpoint, file):
    try:
        half_then_full(checkpoint, file)
    except OSError:
        raise RuntimeError("unexpected pos 768 vs 662")  # noqa: B904 — as torch does


def never_flushed(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("patched", "replacement", "reason"),
    [
        ("torch.save", half_then_full, FULL),
        ("torch.save", half_then_broken, "PytorchStreamWriter failed writing file"),
        ("torch.save", half_then_hidden, FULL),
        ("torch.save", lambda checkpoint, file: file.write(b"nonsense"), "what was written does not read back: cannot"),
        ("os.fsync", never_flushed, FULL),  # where a full network disk says so
        ("shutil.disk_usage", lambda path: (100, 90, 10), "it needs 4e-06 GB and 1e-08 GB are free"),
    ],
)
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, patched, replacement, reason):
    target, io = tmp_path / step_name(1), AtomicCheckpointIO()
    io.save_checkpoint(content_of(1), target)
    assert io.failure is io.wait() is None
    old = target.read_bytes()
    with monkeypatch.context() as patch:
        if patched == "shutil.disk_usage":
            usage = checkpoint_io.shutil._ntuple_diskusage
            patch.setattr(patched, lambda path: usage(*replacement(path)))
        else:
            patch.setattr(patched, replacement)
        io.save_checkpoint({"a": torch.zeros(1000)}, target)  # the other ranks wait behind this: nothing is raised
    assert isinstance(io.failure, OSError)
    assert (io.failure.strerror or str(io.failure)).startswith(reason)
    assert "\n" not in io.failure.strerror
    assert target.read_bytes() == old
    assert names(tmp_path) == [step_name(1)]
    io.save_checkpoint(content_of(1), target)
    assert io.failure is None


def test_a_mistake_in_the_program_is_no_failure_of_the_disk(tmp_path):
    for asynchronous in (False, True):
        io = AtomicCheckpointIO(asynchronous=asynchronous)
        with pytest.raises((AttributeError, TypeError), match="local object|generator|pickle"):  # noqa: PT012
            io.save_checkpoint({"a": lambda: None}, tmp_path / "a.ckpt")
            io.wait()
        assert names(tmp_path) == []
        io.teardown()


@pytest.mark.parametrize(
    ("odd", "name"),
    [
        (numpy.float64(1), "numpy"),
        (Path("a"), "pathlib"),
        (defaultdict(int), "collections.defaultdict"),
        (frozenset({1}), "frozenset"),
        (1j, "complex"),
    ],
)
def test_what_is_no_plain_data_is_no_failure_of_the_disk(tmp_path, odd, name):
    for asynchronous in (False, True):
        io = AtomicCheckpointIO(asynchronous=asynchronous)
        with pytest.raises(TypeError, match=rf"\Acheckpoint=.*a\.ckpt: cannot be saved: it names '.*{name}.*\Z"):  # noqa: PT012
            io.save_checkpoint(content_of(1) | {"callbacks": {"mine": {"state": odd}}}, tmp_path / "a.ckpt")
            io.wait()
        assert names(tmp_path) == []
        io.teardown()


def test_what_a_killed_save_left_behind_is_removed(tmp_path):
    (tmp_path / ".step_0000002.ckpt.partial").write_bytes(b"half")
    (tmp_path / ".best.json.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"whole")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / step_name(1))
    assert names(tmp_path) == ["notes.txt", step_name(1)]


@pytest.mark.parametrize("copied", [False, True])
def test_linking(tmp_path, monkeypatch, copied):
    best, sources = tmp_path / "best.ckpt", [tmp_path / step_name(step) for step in (1, 2)]
    for step, source in enumerate(sources, 1):
        write_checkpoint(content_of(step), source)
    if copied:  # a disk without links

        def no_links(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    for source in (*sources, sources[1]):  # the last time both are names of one file already
        link_atomically(source, best)
        assert is_whole(best)
        assert best.read_bytes() == source.read_bytes()
        assert best.samefile(source) is not copied
    assert names(tmp_path) == ["best.ckpt", *(source.name for source in sources)]


def test_a_crash_while_linking_does_not_make_the_next_save_write_into_a_good_file(tmp_path):
    good = tmp_path / step_name(1)
    write_checkpoint(content_of(1), good)
    os.link(good, tmp_path / ".best.ckpt.partial")
    write_atomically(tmp_path / "best.ckpt", lambda file: file.write(b"other"))
    assert is_whole(good)


def test_loading_is_strict_whatever_lightning_asks_for(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(content_of(1), path)
    with pytest.raises(ValueError, match=r"a\.ckpt: has no optimizer_states; it holds weights for init_from="):
        AtomicCheckpointIO().load_checkpoint(path)
    torch.save(content_of(1) | {"config": {"a": torch.nn.Linear(1, 1)}}, path)
    with pytest.raises(ValueError, match="cannot be read as plain data"):
        AtomicCheckpointIO().load_checkpoint(path, map_location="cpu", weights_only=False)


# --- asynchronous ---


@pytest.fixture
def gate(monkeypatch):
    """Writing waits for it."""
    opened, write = threading.Event(), checkpoint_io.write_checkpoint

    def wait_and_write(checkpoint, path):
        assert opened.wait(30)
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", wait_and_write)
    return opened


def test_the_background_writes_what_was_there_when_it_was_asked_to(tmp_path, gate):
    content, io = content_of(1) | {"callbacks": {"seen": {1, 2}}}, AtomicCheckpointIO(asynchronous=True)
    io.save_checkpoint(content, tmp_path / step_name(1))
    content["state_dict"]["network.w"].zero_()
    content["ema"]["ema"]["w"].zero_()
    content["config"]["step"] = 99
    content["callbacks"].pop("seen").clear()
    assert names(tmp_path) == []
    gate.set()
    assert io.wait() is None
    written = load_checkpoint(tmp_path / step_name(1))
    assert written.pop("callbacks") == {"seen": {1, 2}}
    assert is_content(written, content_of(1))
    io.teardown()


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    io = AtomicCheckpointIO(asynchronous=True)
    io.save_checkpoint(content_of(1), tmp_path / step_name(1))
    threading.Timer(0.1, gate.set).start()
    io.save_checkpoint(content_of(2), tmp_path / step_name(2))
    assert verify(tmp_path / step_name(1)) is None
    io.teardown()
    assert names(tmp_path) == [step_name(1), step_name(2)]
    io.save_checkpoint(content_of(3), tmp_path / step_name(3))  # Lightning tears down before the end is saved
    io.teardown()
    assert names(tmp_path) == [step_name(1), step_name(2), step_name(3)]


def test_a_failure_in_the_background_is_kept_until_it_is_asked_for(tmp_path, monkeypatch):
    io = AtomicCheckpointIO(asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", half_then_full)
        io.save_checkpoint(content_of(1), tmp_path / step_name(1))
        assert io.wait().errno == errno.ENOSPC
    assert io.wait().errno == errno.ENOSPC
    assert names(tmp_path) == []
    io.save_checkpoint(content_of(1), tmp_path / step_name(1))
    assert io.wait() is None
    io.teardown()


def test_both_ways_write_the_same_file_and_can_be_gone_on_from(tmp_path):
    files = []
    for asynchronous in (False, True):
        run_dir = tmp_path / str(asynchronous)
        fit(tiny_module(), run_dir, steps=3, callbacks=[Checkpoints(every=1, asynchronous=asynchronous)])
        files.append(newest_checkpoint(run_dir))
    one, other = (load_checkpoint(file) for file in files)
    assert one.keys() == other.keys()
    assert equal(one["state_dict"], other["state_dict"])
    assert equal(one["ema"]["ema"], other["ema"]["ema"])
    assert one["loops"] == other["loops"]
    assert one["state_dict"]._metadata == other["state_dict"]._metadata
    assert files[0].stat().st_size == files[1].stat().st_size
    ends = [tiny_module(), tiny_module()]
    for file, module in zip(files, ends, strict=True):
        fit(module, file.parents[1] / "rest", steps=5, resume=file)
    assert equal(weights_of(ends[0]), weights_of(ends[1]))
