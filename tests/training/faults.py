"""Faults to inject while checkpoints are written, each with a count of what they have cost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
from crashes import Recorder, content_of, crashes, is_whole, losses, losses_of_the_best, restore, start

from denoiselab.training import saving
from denoiselab.training.checkpoint import FOLDER, newest_valid, step_name
from denoiselab.training.checkpoint_io import write_checkpoint


class Count:
    """How many faults of a kind were injected, and what the others have cost."""

    def __init__(self):
        self.injected, self.lost = 0, []

    def add(self, lost):
        self.injected += 1
        self.lost += [list(lost)] if (lost := list(lost)) else []


def train_until_killed(run_dir, pipe, asynchronous, size):
    """Save step after step, and tell of each one that is saved for good."""
    trainer = start(run_dir, asynchronous=asynchronous, size=size)
    told = trainer.global_step
    os.write(pipe, b"0\n")
    while True:
        trainer.step(trainer.global_step + 1)
        if trainer.checkpoints._saved > told:
            told = trainer.checkpoints._saved
            os.write(pipe, f"{told}\n".encode())


def kill_in_rounds(run_dir, rounds, seed=0):
    """Kill a process that saves, at a random moment, and go on in the same folder with the next."""
    count, rng, folder, saved, torn = Count(), random.Random(seed), run_dir / FOLDER, [], 0
    start(run_dir.with_name("warm")).step(
        1
    )  # the forks are of a warm process: torch imports a part of itself on first use
    for _ in range(rounds):
        asynchronous = rng.random() < 0.5
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                train_until_killed(run_dir, write, asynchronous, size=20_000)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as pipe:
            assert pipe.readline() == "0\n"
            saved += [int(pipe.readline()) for _ in range(rng.randrange(4))]
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            saved += [int(line) for line in pipe]
        torn += any(folder.glob(".*.partial"))
        count.add(losses(folder, saved))
    start(run_dir)
    count.add(losses_of_the_best(folder, saved))
    count.injected -= 1
    return count, torn, max(saved, default=0)


def record(run_dir, monkeypatch, steps, **settings):
    """The operations of a run, and after how many of them each step was saved for good."""
    with monkeypatch.context() as patch:
        trainer = start(run_dir, **settings)
        recorder, returned = Recorder(patch), {}
        for step in range(1, steps + 1):
            trainer.step(step)
            assert trainer.checkpoints.last_failure is None
            returned[step] = len(recorder.log)
    return recorder.log, returned


def unplug_everywhere(tmp_path, log, returned, best=True, until_lost=False):
    """Leave the folder as each possible power cut does, and go on from there."""
    count, checked = Count(), {}
    for end, state in crashes(log):
        if until_lost and count.lost:
            break
        saved = [step for step, position in returned.items() if position <= end]
        # What half-written files hold makes no difference, unless they are other names of good ones.
        named = {inode for name, (inode, _) in state.items() if not name.endswith(".partial")}
        state = {name: (inode, data if inode in named else b"half") for name, (inode, data) in state.items()}
        key = (tuple(sorted(state.items())), len(saved))
        if key not in checked:
            run_dir = tmp_path / f"crash_{len(checked)}"
            checked[key] = list(left_over(run_dir, state, saved, best))
            shutil.rmtree(run_dir)
        count.add(checked[key])
    return count, len(checked)


def left_over(run_dir, state, saved, best):
    folder = run_dir / FOLDER
    restore(folder, state)
    yield from losses(folder, saved)
    trainer = start(run_dir, best="val" if best else None)
    if best:
        yield from losses_of_the_best(folder, saved)
    trainer.step(trainer.global_step + 1)
    yield from losses(folder, [*saved, trainer.global_step])
    if any(folder.glob(".*.partial")):
        yield "something half written is left"


def fail_each_operation(tmp_path, monkeypatch, codes=(errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES)):
    """Let each system call of a save fail in turn, with each error; then the disk is well again."""
    log, _ = record(tmp_path / "run", monkeypatch, 4, size=20)
    count, failed = Count(), 0
    for code in codes:
        for number in range(10**6):
            run_dir = tmp_path / f"fails_{code}_{number}"
            trainer = start(run_dir, size=20)
            for step in (1, 2, 3):
                trainer.step(step)
            with monkeypatch.context() as patch:
                failing = Failing(patch, number, code)
                trainer.step(4)
            if not failing.reached:
                break
            line, path = trainer.checkpoints.last_failure, run_dir / FOLDER / step_name(4)
            failed += line is not None
            assert line in (None, f"checkpoint={path}: could not be written ({os.strerror(code)})")
            saved = [1, 2, 3] if line else [1, 2, 3, 4]
            lost = list(losses(run_dir / FOLDER, saved))
            trainer.step(5)
            lost += losses(run_dir / FOLDER, [*saved, 5])
            lost += [] if trainer.checkpoints.last_failure is None else ["does not recover"]
            start(run_dir)
            count.add([*lost, *losses_of_the_best(run_dir / FOLDER, [1, 2, 3])])
            shutil.rmtree(run_dir)
    assert len(log) > 0
    return count, failed


class Failing(Recorder):
    """A disk of which one operation fails, that of this number."""

    def __init__(self, patch, number, code):
        self.left, self.code, self.reached = number, code, False
        super().__init__(patch)
        for name in ("stat", "listdir", "statvfs"):
            patch.setattr(os, name, self.look(name))

    def fail(self):
        self.left -= 1
        if self.left == -1:
            self.reached = True
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path, mode):
        self.fail()
        file = open(path, mode)  # noqa: SIM115
        return file if mode == "rb" else FailingFile(file, self.fail)

    def open_folder(self, path, flags, *rest):
        if os.path.isdir(path):
            self.fail()
        return self.real["open"](path, flags, *rest)

    def fsync(self, descriptor):
        self.fail()
        self.real["fsync"](descriptor)

    def look(self, name):
        real = getattr(os, name)

        def look(*arguments, **rest):
            self.fail()
            return real(*arguments, **rest)

        return look

    def replace(self, source, target):
        self.fail()
        self.real["replace"](source, target)

    def link(self, source, target):
        self.fail()
        self.real["link"](source, target)

    def unlink(self, path, **rest):
        self.fail()
        self.real["unlink"](path, **rest)


class FailingFile:
    """A file of which half a write goes through when it fails."""

    def __init__(self, file, fail):
        self.file, self.fail, self.fileno = file, fail, file.fileno

    def write(self, data):
        try:
            self.fail()
        except OSError:
            self.file.write(bytes(data)[: len(data) // 2])
            raise
        return self.file.write(data)

    def flush(self):
        self.fail()
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@contextmanager
def small_disk(folder, kilobytes):
    """A disk of that size; skips where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_the_disk(disk, monkeypatch, rounds):
    """Leave a little less room than a checkpoint needs, down to none, and save."""
    count, run_dir, saved = Count(), disk / "run", [1, 2]
    trainer = start(run_dir, size=10_000)
    for step in (1, 2):
        trainer.step(step)
    size, filler = (run_dir / FOLDER / step_name(1)).stat().st_size, disk / "filler"
    for k in range(rounds):
        room = (size - 4096) * k // rounds
        with filler.open("wb") as file:
            file.write(bytes(max(0, shutil.disk_usage(disk).free - room)))
        with monkeypatch.context() as patch:
            if k % 2:  # a quota, or somebody else's files: the room is only found to be missing while it is written
                patch.setattr(saving.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12))
            trainer.step(trainer.global_step + 1)
        line = trainer.checkpoints.last_failure
        lost = list(losses(run_dir / FOLDER, saved)) + ([] if line else ["it did not fail"])
        filler.unlink()
        trainer.step(trainer.global_step + 1)
        saved.append(trainer.global_step)
        lost += [] if trainer.checkpoints.last_failure is None else [trainer.checkpoints.last_failure]
        count.add([*lost, *losses(run_dir / FOLDER, saved)])
    return count


def remount(disk, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True, capture_output=True)


def make_read_only(disk, rounds):
    """Take the disk's permission to write away, save, and give it back."""
    count, run_dir, saved = Count(), disk / "run", [1, 2]
    trainer = start(run_dir)
    for step in (1, 2):
        trainer.step(step)
    for _ in range(rounds):
        remount(disk, "ro")
        trainer.step(trainer.global_step + 1)
        line = trainer.checkpoints.last_failure
        expected = f"{step_name(trainer.global_step)}: could not be written (Read-only file system)"
        lost = [] if line and line.endswith(expected) else [line]
        lost += losses(run_dir / FOLDER, saved)
        start(run_dir)  # as a reader would
        remount(disk, "rw")
        trainer.step(trainer.global_step + 1)
        saved.append(trainer.global_step)
        count.add([*lost, *losses(run_dir / FOLDER, saved)])
    return count


def damage(run_dir, damages):
    """Damage the newer of two checkpoints in each way; it must be refused by name, or hold what it held."""
    folder, count, refused = run_dir / FOLDER, Count(), 0
    for step in (1, 2):
        write_checkpoint(content_of(step, size=20), folder / step_name(step))
    newer = folder / step_name(2)
    whole = newer.read_bytes()
    for change in damages(whole):
        newer.write_bytes(change)
        newest, lines = newest_valid(folder)
        refused += bool(lines)
        lost = [] if newest is not None and is_whole(newest) else ["not what was written"]
        named = not lines if newest == newer else len(lines) == 1 and lines[0].startswith(f"checkpoint={newer}: ")
        lost += [] if named and "\n" not in "".join(lines) else [f"not named: {lines}"]
        count.add(lost)
        assert newer.read_bytes() == change
    return count, refused


def truncations(stride):
    return lambda whole: (whole[:length] for length in range(0, len(whole), stride))


def flips(stride):
    def flipped(whole):
        for bit in range(0, 8 * len(whole), stride):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            yield bytes(content)

    return flipped
