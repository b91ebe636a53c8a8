"""Checkpoints whose content follows from their step, a trainer that only saves them, and a disk that can be unplugged."""

from __future__ import annotations

import itertools
import json
import os
from types import SimpleNamespace

import torch

from denoiselab.training import checkpoint_io
from denoiselab.training.checkpoint import (
    FOLDER,
    SCHEMA,
    checkpoints_of,
    load_checkpoint,
    newest_valid,
    step_of,
    verify,
)
from denoiselab.training.checkpoint_io import AtomicCheckpointIO
from denoiselab.training.saving import BEST, BEST_NOTE, Checkpoints


def content_of(step, size=500):
    """What the checkpoint of a step holds."""
    weights = torch.randn(size, generator=torch.Generator().manual_seed(step))
    return {
        "schema": SCHEMA,
        "config": {"step": step},
        "ema": {"ema": {"w": 2 * weights}},
        "ema_updates": step,
        "global_step": step,
        "state_dict": {"network.w": weights},
    }


def value_of(step):
    """What validation finds at a step: the best of 1, 2, 3, ... are 1, 2, 4, 7 and 11."""
    return {1: 9.0, 2: 7.0, 3: 8.0, 4: 5.0, 5: float("nan"), 6: 6.0, 7: 4.0, 11: 3.0}.get(step, 9.5)


def is_whole(path):
    """Whether a checkpoint holds what that of its step should, bit for bit."""
    loaded = load_checkpoint(path)
    wanted = content_of(loaded["global_step"], size=len(loaded["state_dict"]["network.w"]))
    return step_of(path) in (None, loaded["global_step"]) and is_content(loaded, wanted)


def is_content(loaded, wanted):
    """Whether what was loaded is what was to be written."""
    return (
        torch.equal(loaded["state_dict"]["network.w"], wanted["state_dict"]["network.w"])
        and torch.equal(loaded["ema"]["ema"]["w"], wanted["ema"]["ema"]["w"])
        and {**loaded, "state_dict": 0, "ema": 0} == {**wanted, "state_dict": 0, "ema": 0}
    )


class SavingTrainer:
    """As much of Lightning's trainer as saving needs; a step saves and then validates."""

    def __init__(self, run_dir, checkpoints, *, size=500, max_steps=10**9):
        self.default_root_dir, self.checkpoints, self.size, self.max_steps = str(run_dir), checkpoints, size, max_steps
        self.strategy = SimpleNamespace(checkpoint_io=AtomicCheckpointIO(), broadcast=lambda value: value)
        self.validation = SimpleNamespace(latest={})
        self.callbacks, self.is_global_zero, self.global_step = [self.validation, checkpoints], True, 0
        self.lightning_module = None
        checkpoints.setup(self, None, "fit")

    def save_checkpoint(self, path, weights_only):
        assert weights_only is False
        self.strategy.checkpoint_io.save_checkpoint(content_of(self.global_step, self.size), path)

    def step(self, step):
        self.global_step = step
        self.checkpoints.on_train_batch_end(self)
        self.validation.latest = {"val": value_of(step)}
        self.checkpoints.on_validation_end(self)


def start(run_dir, *, size=500, **settings):
    """A trainer in a folder that may hold checkpoints already; it goes on from the newest good one."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    trainer = SavingTrainer(
        run_dir, Checkpoints(**{"every": 1, "best": "val", "reserve_gb": 0.0} | settings), size=size
    )
    newest, _ = newest_valid(run_dir / FOLDER)
    trainer.global_step = 0 if newest is None else step_of(newest)
    return trainer


def losses(folder, saved, keep=2):
    """What a fault has cost, in words, if it has cost anything.

    Args:
        folder: of the checkpoints, after the fault.
        saved: the steps that were saved for good before it.
        keep: how many must be there.
    """
    newest, damaged = newest_valid(folder)
    if not saved and newest is None:
        return
    if newest is None:
        yield "no checkpoint loads"
        return
    if not is_whole(newest):
        yield f"{newest.name} has another content"
    if step_of(newest) < max(saved, default=0):
        yield f"went back from step {max(saved)} to {step_of(newest)}"
    if damaged:
        yield f"damaged: {damaged}"
    good = [path for path in checkpoints_of(folder) if verify(path) is None and is_whole(path)]
    if len(good) < min(keep, len(saved)):
        yield f"only {len(good)} are good"
    if (folder / BEST).exists() and (verify(folder / BEST) is not None or not is_whole(folder / BEST)):
        yield "the best is damaged"


def losses_of_the_best(folder, saved):
    """What a fault has cost of the best, once the run has been started again."""
    worst = min((value_of(step) for step in saved if value_of(step) == value_of(step)), default=None)
    if worst is None:
        return
    note = json.loads((folder / BEST_NOTE).read_text())
    if load_checkpoint(folder / BEST)["global_step"] != note["step"]:
        yield f"best.json speaks of step {note['step']}, not of best.ckpt"
    if not note["value"] == value_of(note["step"]) <= worst:
        yield f"the best was {worst}, and is {note}"


class Recorder:
    """Notes what is written, synced, renamed, linked and deleted in a folder, as it is really done."""

    def __init__(self, monkeypatch):
        self.log, self.names, self.open_files, self.inodes = [], {}, {}, itertools.count()
        self.real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "link", "unlink")}
        monkeypatch.setattr(checkpoint_io, "open", self.open, raising=False)
        for name in ("fsync", "replace", "link", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, name))
        monkeypatch.setattr(os, "open", self.open_folder)

    def open(self, path, mode):
        file = open(path, mode, buffering=0)  # noqa: SIM115
        if mode == "rb":
            return file
        inode = next(self.inodes) if mode == "xb" or path.name not in self.names else self.names[path.name]
        self.names[path.name] = inode
        self.open_files[file.fileno()] = inode
        self.log.append(("name", path.name, inode) if mode == "xb" else ("empty", path.name, inode))
        return RecordedFile(file, lambda data: self.log.append(("write", inode, bytes(data))))

    def open_folder(self, path, flags, *rest):
        descriptor = self.real["open"](path, flags, *rest)
        if os.path.isdir(path):
            self.open_files[descriptor] = None
        return descriptor

    def fsync(self, descriptor):
        self.real["fsync"](descriptor)
        self.log.append(("sync", self.open_files[descriptor]))

    def replace(self, source, target):
        self.real["replace"](source, target)
        if self.names[source.name] != self.names.get(target.name):  # two names of one file: nothing happens (rename(2))
            self.names[target.name] = self.names.pop(source.name)
            self.log.append(("rename", source.name, target.name, self.names[target.name]))

    def link(self, source, target):
        self.real["link"](source, target)
        self.names[target.name] = self.names[source.name]
        self.log.append(("name", target.name, self.names[target.name]))

    def unlink(self, path, **rest):
        self.real["unlink"](path, **rest)
        name = os.path.basename(path)
        if self.names.pop(name, None) is not None:
            self.log.append(("gone", name))


class RecordedFile:
    """A file that tells what is written to it."""

    def __init__(self, file, note):
        self.file, self.note, self.flush, self.fileno = file, note, file.flush, file.fileno

    def write(self, data):
        self.note(data)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def crashes(log):
    """Every state of the folder that a power cut can leave, as (prefix length, {name: (file, content)}).

    After any prefix of the operations, each change of a name since the folder was last synced is there or not, and of each
    file the data since it was last synced are absent, half there, there as zeros or there.
    """
    for end in range(len(log) + 1):
        whole, synced, names, pending = {}, {}, {}, []
        for kind, *rest in log[:end]:
            if kind in ("name", "rename", "gone"):
                pending.append((kind, *rest))
                if kind == "name" and rest[1] not in whole:
                    whole[rest[1]] = synced[rest[1]] = b""
            elif kind == "empty":  # an old file is opened to be written over
                pending.append(("name", *rest))
                whole[rest[1]] = b""
                synced.setdefault(rest[1], b"")
            elif kind == "write":
                whole[rest[0]] += rest[1]
            elif kind == "sync" and rest[0] is None:
                names, pending = named(names, pending), []
            elif kind == "sync":
                synced[rest[0]] = whole[rest[0]]
        for there in itertools.product((False, True), repeat=len(pending)):
            state = named(names, [change for change, kept in zip(pending, there, strict=True) if kept])
            loose = sorted({inode for inode in state.values() if synced[inode] != whole[inode]})
            for chosen in itertools.product(*(partly(synced[inode], whole[inode]) for inode in loose)):
                data = dict(zip(loose, chosen, strict=True))
                yield end, {name: (inode, data.get(inode, whole[inode])) for name, inode in state.items()}


def restore(folder, state):
    """Write a folder as a power cut has left it."""
    folder.mkdir(parents=True)
    first = {}
    for name, (inode, content) in state.items():
        if inode in first:
            os.link(folder / first[inode], folder / name)
        else:
            (folder / name).write_bytes(content)
            first[inode] = name


def named(names, changes):
    """The names of a folder after changes of them."""
    names = dict(names)
    for kind, name, *rest in changes:
        names.pop(name, None)
        if kind == "name":
            names[name] = rest[0]
        elif kind == "rename":
            names[rest[0]] = rest[1]
    return names


def partly(synced, whole):
    """What a disk may hold of data that were written and not synced."""
    half = (len(synced) + len(whole)) // 2 if whole.startswith(synced) else len(whole) // 2
    return {synced, whole[:half], bytes(len(whole)), whole}
