"""What a run remembers of its data: files that are lost keep their places, and nothing else passes for the same data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from denoiselab.data.image_folder import ImageFolder
from denoiselab.data.imagenet import ImageNet
from denoiselab.data.recorded import Recorded, read_recorded
from stand_ins import random_images

COMMON = {"channels": 3, "resolution": 8, "num_classes": 2, "batch_size": 4, "seed": 0, "test_root": None}
KINDS = {
    "folder": (ImageFolder, {"cache": False}),
    "folder-cached": (ImageFolder, {"cache": True}),
    "imagenet": (ImageNet, {"crop": "adm"}),
    "imagenet-verified": (ImageNet, {"crop": "adm", "verify": True}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """Ten images in each of two classes, one of them empty from the first."""
    for label in range(2):
        (tmp_path / "root" / "train" / str(label)).mkdir(parents=True)
        for i, pixels in enumerate(random_images(10, 12, seed=label)):
            Image.fromarray(pixels).save(tmp_path / "root" / "train" / str(label) / f"{i}.png")
    (tmp_path / "root" / "train" / "0" / "4.png").write_bytes(b"")
    return tmp_path / "root"


def module(kind, root, record=None, **changes):
    cls, more = KINDS[kind]
    where = root / "train" if cls is ImageFolder else root
    values = {**COMMON, **more, "root": str(where), "test_fraction": 0.2, "on_corrupt": "skip", **changes}
    data = cls(**values)
    if record is not None:
        data.recall(json.loads(json.dumps(record)))
    return data


def prints(data):
    return [data.fingerprint(split) for split in ("train", "test")], len(data.train_set()), len(data.test_set())


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("kind", KINDS)
def test_lost_files_keep_their_places(root, kind, caplog):
    first = module(kind, root)
    before, record = prints(first), first.record()
    pictures = [first.train_set().image(i) for i in range(len(first.train_set()))]
    assert prints(module(kind, root, record)) == before
    lost = [root / "train" / name for name in ("0/2.png", "1/0.png", "1/7.png", "1/9.png")]
    cut(lost[0])
    lost[1].write_bytes(b"")
    lost[2].unlink()
    lost[3].unlink()
    assert prints(module(kind, root)) != before
    caplog.clear()
    data = module(kind, root, record)
    assert prints(data) == before
    assert data.record() == record
    said = [r.getMessage() for r in caplog.records if r.getMessage().endswith("others of their class stand in")]
    assert len(said) == 1
    assert f"{lost[0]} is cut short" in said[0]
    samples, shown = data.train_set(), 0
    for i, picture in enumerate(pictures):
        sample = samples[i]
        shown += sample["stand_in"]
        assert sample["stand_in"] or torch.equal(sample["image"], picture)
    assert 0 < shown <= 5
    with pytest.raises(ValueError, match=r"cannot be decoded: .*; repair or remove them, or set on_corrupt=skip$"):
        module(kind, root, record, on_corrupt="fail").check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["other bytes", "new file", "other class"])
def test_what_is_not_a_loss_is_other_data(root, kind, change):
    first = module(kind, root)
    before, record = prints(first), first.record()
    (root / "train" / "1" / "3.png").unlink()
    if change == "other class":
        os.rename(root / "train" / "0" / "1.png", root / "train" / "1" / "1b.png")
    else:
        name = "new.png" if change == "new file" else "8.png"
        Image.fromarray(random_images(1, 13, seed=9)[0]).save(root / "train" / "1" / name)
    data = module(kind, root, record)
    assert prints(data) == prints(module(kind, root)) != before
    assert data.record() != record


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_loses_all_its_images_and_a_set_that_does(root, kind):
    first = module(kind, root)
    before, record = prints(first), first.record()
    for path in (root / "train" / "1").iterdir():
        path.unlink()
    assert prints(module(kind, root, record)) == before
    with pytest.raises(ValueError, match=r"holds no images"):
        module(kind, root).check()
    shutil.rmtree(root / "train")
    with pytest.raises(ValueError, match="root="):
        module(kind, root, record).check()


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_a_file_that_was_left_out_and_is_repaired_changes_nothing(root, kind):
    first = module(kind, root)
    before, record = prints(first), first.record()
    Image.fromarray(random_images(1, 12)[0]).save(root / "train" / "0" / "4.png")
    assert prints(module(kind, root, record)) == before
    assert prints(module(kind, root)) != before


def test_separate_test_folders(root, tmp_path):
    shutil.copytree(root / "train", tmp_path / "test")
    first = module("folder", root, test_root=str(tmp_path / "test"))
    before, record = prints(first), first.record()
    (tmp_path / "test" / "1" / "3.png").unlink()
    again = module("folder", root, record, test_root=str(tmp_path / "test"))
    assert prints(again) == before
    lost = [f.name for f in again.test_set().files].index("1/3.png")
    assert (again.test_set()[lost]["stand_in"], again.train_set()[lost]["stand_in"]) == (1, 0)
    shutil.copytree(root / "train", root / "val")
    first = module("imagenet", root)
    before, record = prints(first), first.record()
    (root / "val" / "1" / "3.png").unlink()
    again = module("imagenet", root, record)
    assert prints(again) == before
    assert sum(again.test_set()[i]["stand_in"] for i in range(20)) == 2
    assert sum(again.train_set()[i]["stand_in"] for i in range(20)) == 1


def test_data_in_one_piece_has_no_record(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=random_images(4, 8), arr_1=np.zeros(4, np.int64))
    data = module("imagenet", tmp_path / "a.npz")
    assert data.record() is None
    data.recall({})
    data.check()


GOOD = {"names": ["a/b.png"], "labels": [0], "marks": ["12"]}


@pytest.mark.parametrize(
    "change",
    [
        *({"names": [name]} for name in ("", "/etc/passwd", "../a.png", "a/../../b", "a\0b", "\ud800", 3, None)),
        *({"labels": [label]} for label in (-2, 2**31, True, "0", 0.5, None)),
        *({"marks": [mark]} for mark in ("x", "-1", "1" * 19, "a" * 63, 12)),
        *({"names": []}, {"marks": None}, {"labels": {}}),
    ],
    ids=str,
)
def test_a_record_of_somebody_elses(change):
    assert read_recorded(GOOD) == Recorded(**GOOD)
    with pytest.raises(ValueError, match=r"must hold|outside the folder|encode"):
        read_recorded(GOOD | change)
    with pytest.raises(ValueError, match="must hold"):
        module("folder", Path(), {"train": [1]})
