from __future__ import annotations

import errno
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import equal, fit, tiny_module, weights_of

from denoiselab.training.checkpoint import (
    SCHEMA,
    AtomicCheckpointIO,
    Checkpoints,
    checkpoints_of,
    load_checkpoint,
    network_weights,
    newest_checkpoint,
)
from denoiselab.training.ema import EMA


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_written_under_its_name_alone(tmp_path):
    target = tmp_path / "new" / "step_1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3)}, target)
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(4)}, target)
    assert torch.equal(torch.load(target, weights_only=True)["a"], torch.arange(4))
    assert names(target.parent) == ["step_1.ckpt"]


def half_then_full(checkpoint, file):
    file.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_broken(checkpoint, file):
    file.write(b"half a checkpoint")
    raise RuntimeError("PytorchStreamWriter failed writing file")


def never_flushed(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("patched", "replacement", "error"),
    [
        ("torch.save", half_then_full, OSError),
        ("torch.save", half_then_broken, RuntimeError),
        ("os.fsync", never_flushed, OSError),  # where a full network disk says so
    ],
)
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, patched, replacement, error):
    target = tmp_path / "step_0000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, target)
    old = target.read_bytes()
    monkeypatch.setattr(patched, replacement)
    with pytest.raises(error):
        AtomicCheckpointIO().save_checkpoint({"a": 2}, target)
    assert target.read_bytes() == old
    assert names(tmp_path) == ["step_0000001.ckpt"]


def test_the_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("fsync"))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert events == ["fsync", "rename", "fsync"]  # the file, then its name, then the folder that holds the name


def test_what_a_killed_save_left_behind_is_no_checkpoint_and_in_nobodys_way(tmp_path):
    left = tmp_path / "checkpoints" / ".step_0000002.ckpt.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, left.with_name("step_0000001.ckpt"))
    assert newest_checkpoint(tmp_path).name == "step_0000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 2}, left.with_name("step_0000002.ckpt"))
    assert names(left.parent) == ["step_0000001.ckpt", "step_0000002.ckpt"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_newest_are_kept(tmp_path, accumulate):
    fit(tiny_module(), tmp_path, steps=7, accumulate=accumulate, callbacks=[Checkpoints(every=2, keep=3)])
    expected = ["step_0000004.ckpt", "step_0000006.ckpt", "step_0000007.ckpt"]  # the end is saved too
    assert names(tmp_path / "checkpoints") == expected
    assert [path.name for path in checkpoints_of(tmp_path / "checkpoints")] == expected


def test_steps_are_compared_as_numbers(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step_9999999.ckpt", "step_10000000.ckpt", "step_0000001.ckpt", "step_x.ckpt", "other.ckpt"):
        (folder / name).touch()
    assert newest_checkpoint(tmp_path).name == "step_10000000.ckpt"
    assert len(checkpoints_of(folder)) == 3


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"run={tmp_path}: has no checkpoint in checkpoints/")):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0: must be at least 1"),
        ({"every": 5, "keep": 1}, "keep=1: must be at least 2"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**arguments)


def test_a_checkpoint_holds_raw_and_averaged_weights_as_plain_data(tmp_path):
    config = {"seed": 3, "sampler": {"_target_": "x.Y", "nfe": 20, "list": [1, 2.5, None, True]}}
    module = tiny_module(config=config, ema=EMA(decays={"ema": 0.9, "slow": 0.99}))
    fit(module, tmp_path, callbacks=[Checkpoints(every=100)])
    path = newest_checkpoint(tmp_path)
    plain = torch.load(path, weights_only=True)
    assert plain["schema"] == SCHEMA
    assert plain["config"] == config
    assert plain["ema_updates"] == 4
    assert set(plain["ema"]) == {"ema", "slow"}
    checkpoint = load_checkpoint(path)
    raw = weights_of(module)
    assert equal(network_weights(checkpoint, "raw"), raw)
    for name in ("ema", "slow"):
        assert equal(network_weights(checkpoint, name), module.ema.averages[name])
        assert not equal(network_weights(checkpoint, name), raw)
    with pytest.raises(ValueError, match="weights=fast: the checkpoint has ema, slow, raw"):
        network_weights(checkpoint, "fast")


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    whole = tiny_module(dropout=0.3)
    fit(whole, tmp_path / "whole", steps=5)
    fit(tiny_module(dropout=0.3), tmp_path / "part", steps=3, callbacks=[Checkpoints(every=100)])
    torch.manual_seed(99)  # no generator's state is needed
    resumed = tiny_module(dropout=0.3)
    trainer = fit(resumed, tmp_path / "rest", steps=5, resume=newest_checkpoint(tmp_path / "part"))
    assert trainer.global_step == resumed.ema.updates == 5
    assert equal(weights_of(resumed), weights_of(whole))
    assert equal(resumed.ema.averages["ema"], whole.ema.averages["ema"])


def test_saving_while_an_average_is_applied_stores_raw_as_raw(tmp_path):
    seen = {}

    class SaveInValidation(Callback):
        def on_validation_end(self, trainer, module):
            seen["raw"] = weights_of(module)
            with module.denoiser("ema"):
                seen["applied"] = weights_of(module)
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    module = tiny_module()
    fit(module, tmp_path, steps=2, val_every=2, callbacks=[SaveInValidation()])
    checkpoint = load_checkpoint(tmp_path / "inside.ckpt")
    assert not equal(seen["raw"], seen["applied"])
    assert equal(network_weights(checkpoint, "raw"), seen["raw"])
    assert equal(network_weights(checkpoint, "ema"), seen["applied"])
    assert equal(weights_of(module), seen["raw"])


def good_checkpoint(path):
    AtomicCheckpointIO().save_checkpoint({"schema": SCHEMA, "state_dict": {"network.w": torch.zeros(1000)}}, path)
    return path


def refusal(path):
    """The one line that a file is refused with."""
    with pytest.raises(ValueError, match=re.escape(f"checkpoint={path}: ")) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path):
    assert refusal(tmp_path / "no.ckpt").endswith("no such file")
    assert refusal(tmp_path).endswith("no such file")


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_file(tmp_path, share):
    path = good_checkpoint(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "cannot be read as plain data" in refusal(path)


def test_a_flipped_bit(tmp_path):
    path = good_checkpoint(tmp_path / "a.ckpt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(content)
    refusal(path)


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path, victim = tmp_path / "evil.ckpt", tmp_path / "victim"
    content = {"schema": SCHEMA, "state_dict": {}, "config": Hostile(victim)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert "cannot be read as plain data" in refusal(path)
    assert not victim.exists()
    if zipped:
        torch.load(path, weights_only=False)
        assert victim.exists()  # the file was hostile indeed


@pytest.mark.parametrize(
    ("content", "found"),
    [({"schema": 99, "state_dict": {}}, "99"), ({"state_dict": {}}, "None"), ([1, 2], "None")],
)
def test_another_layout(tmp_path, content, found):
    path = tmp_path / "a.ckpt"
    torch.save(content, path)
    assert refusal(path).endswith(f"layout {found} is not the layout {SCHEMA} that this version reads")
