from __future__ import annotations

import os
import pickle
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from denoiselab.data import indexed
from denoiselab.data.decoding import adm_crop, decode, fit
from denoiselab.data.image_folder import ImageFolder
from denoiselab.data.imagenet import WAYS, ImageNet
from stand_ins import random_images, write_downsampled_imagenet, write_imagenet


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def module(root, **changes):
    values = {
        "test_root": None,
        "test_fraction": 0.25,
        "crop": "adm",
        "channels": 3,
        "resolution": 16,
        "num_classes": 2,
        "batch_size": 4,
        "seed": 0,
    }
    return ImageNet(root=None if root is None else str(root), **(values | changes))


def refuses(line, root, **changes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        module(root, **changes).check()
    assert str(caught.value) == line


# -- the crop of ADM --


def test_adm_halves_by_averaging_and_cuts_the_centre():
    pixels = random_images(1, 64)[0]
    means = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    wide = Image.fromarray(np.concatenate([pixels * 0, pixels, pixels * 0], axis=1))
    assert abs(np.array(adm_crop(wide, (16, 16))) - means).max() <= 2.5  # each averaging rounds
    assert abs(np.array(fit(wide, (16, 16))) - means).max() > 10


@pytest.mark.parametrize(
    ("width", "height", "half"), [(50, 40, True), (31, 53, False), (21, 16, False), (9, 12, False)]
)
def test_adm_scales_the_shorter_side_to_whole_pixels(width, height, half):
    image = Image.fromarray(random_images(1, 64)[0][:height, :width])
    cut = np.array(adm_crop(image, (16, 16)))
    if half:
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    size = [round(16 * length / min(image.size)) for length in image.size]
    scaled = np.array(image.resize(size, Image.Resampling.BICUBIC))
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    assert np.array_equal(cut, scaled[top : top + 16, left : left + 16])


def test_an_image_folder_can_be_cut_as_adm_does_it(imagenet_folder):
    values = {"channels": 3, "resolution": 16, "num_classes": 2, "batch_size": 4, "seed": 0}
    folder = {"test_root": str(imagenet_folder / "val"), "test_fraction": 0.1, "on_corrupt": "fail"}
    data = ImageFolder(root=str(imagenet_folder / "train"), **folder, cache=True, crop="adm", **values)
    plain = ImageFolder(root=str(imagenet_folder / "train"), **folder, cache=False, **values)
    whole = module(imagenet_folder)
    for i in range(12):
        assert torch.equal(data.train_set().image(i), whole.train_set().image(i))
    assert not torch.equal(plain.train_set().image(3), whole.train_set().image(3))
    with pytest.raises(ValueError, match=r"^crop=adm: cuts squares, not 16x8; use crop=fit$"):
        module(imagenet_folder, resolution=[16, 8])
    with pytest.raises(ValueError, match=r"^crop=square: must be fit or adm$"):
        module(imagenet_folder, crop="square")
    assert module(imagenet_folder, crop="fit", resolution=[16, 8]).train_set().image(0).shape == (3, 16, 8)


# -- class folders --


def test_class_folders_are_read_image_by_image(imagenet_folder, monkeypatch):
    decoded = []

    def count(path, **how):
        decoded.append(path.name)
        return decode(path, **how)

    monkeypatch.setattr(indexed, "decode", count)
    data = module(imagenet_folder, flip=True)
    train, test = data.train_set(), data.test_set()
    assert (len(train), len(test)) == (12, 6)
    assert (train.flip, test.flip) == (True, False)
    assert decoded == []
    data.check()
    assert decoded == ["n01440764_00.JPEG"] * 2  # the first of each split
    assert [train.label(i) for i in range(12)] == [0] * 6 + [1] * 6
    path = imagenet_folder / "train" / "n01443537" / "n01443537_02.JPEG"
    assert torch.equal(train.image(8), decode(path, channels=3, size=(16, 16), crop="adm"))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert data.fingerprint("train") == module(imagenet_folder).fingerprint("train")
    assert len(set(decoded)) <= 1 + 5


def test_the_digest_names_the_file_and_what_is_made_of_it(imagenet_folder, tmp_path):
    prints = {
        module(imagenet_folder, **changes).fingerprint("train")
        for changes in ({}, {"resolution": 8}, {"crop": "fit"}, {"channels": 1}, {"num_classes": 0})
    }
    assert len(prints) == 5
    shutil.copytree(imagenet_folder, tmp_path / "copy")
    assert module(tmp_path / "copy").fingerprint("train") in prints
    (path,) = (tmp_path / "copy").glob("train/*/n01440764_03.JPEG")
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path.parent, ns=(1, 1))
    assert module(tmp_path / "copy").fingerprint("train") not in prints


def test_without_val_a_fixed_part_of_train_is_for_testing(tmp_path):
    root = write_imagenet(tmp_path / "a", train=8, val=0)
    data = module(root)
    train, test = ({str(s.images.path(row)) for row in s.rows} for s in (data.train_set(), data.test_set()))
    assert (len(train), len(test)) == (12, 4)
    assert not train & test
    again = module(root, seed=5, batch_size=2, num_classes=0)
    assert again.test_set().rows.tolist() == data.test_set().rows.tolist()
    assert [again.test_set().label(i) for i in range(4)] == [-1] * 4
    refuses(f"root={tmp_path / 'b'}: one image is not enough for two splits", _one(tmp_path / "b"), num_classes=1)


def _one(root):
    return write_imagenet(root, train=1, val=0, classes=("a",))


def test_a_folder_elsewhere_can_hold_the_test_images(imagenet_folder, tmp_path):
    write_imagenet(tmp_path / "other", train=2, val=0)
    data = module(imagenet_folder, test_root=str(tmp_path / "other" / "train"))
    assert len(data.test_set()) == 4
    write_imagenet(tmp_path / "third", train=2, val=0, classes=("a", "b"))
    line = f"test_root={tmp_path}/third/train: {tmp_path}/third/train must have the same class folders as "
    refuses(line + f"{imagenet_folder}/train", imagenet_folder, test_root=str(tmp_path / "third" / "train"))


def test_what_is_not_imagenet_says_what_is_expected(imagenet_folder, tmp_path):
    refuses(f"root=null: give {WAYS}", None)
    refuses(f"root={tmp_path}: must be {WAYS}", tmp_path)
    line = f"root={imagenet_folder}: {imagenet_folder}/train has 2 class folders, not num_classes=1000"
    refuses(line, imagenet_folder, num_classes=1000)
    root = write_imagenet(tmp_path / "a", train=2)
    (root / "train" / "n01440764" / "notes.txt").touch()
    for file in (root / "train" / "n01443537").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=rf"^root={root}: {root}/train/n01443537 holds no images \(\.bmp .+\)$"):
        module(root).check()
    for value in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"^test_fraction={value}: must be above 0 and below 1$"):
            module(root, test_fraction=value)


def test_a_broken_image_is_named_when_it_is_drawn(tmp_path):
    root = write_imagenet(tmp_path / "a", train=3)
    paths = sorted((root / "train").rglob("*.JPEG"))
    paths[4].write_bytes(paths[4].read_bytes()[:300])
    paths[0].write_text("nothing")
    with pytest.raises(ValueError, match=rf"^root={root}: cannot decode {paths[0]} \(cannot identify .+\)$"):
        module(root).check()
    with pytest.raises(ValueError, match=rf"^cannot decode {paths[4]} \(.+\)$"):
        module(root).train_set()[4]


# -- the list of files --


def test_files_are_listed_once_until_a_folder_changes(tmp_path, monkeypatch, cache):
    root, scans = write_imagenet(tmp_path / "a"), []
    scan = indexed._list
    monkeypatch.setattr(indexed, "_list", lambda folder: scans.append(folder.name) or scan(folder))
    first = module(root).train_set().images.index
    again = module(root).train_set().images.index
    assert scans == ["n01440764", "n01443537"]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    (kept,) = cache.iterdir()
    for damage in (b"", b"PK\x03\x04 but no zip", kept.read_bytes()[:-200]):
        kept.write_bytes(damage)
        assert len(module(root).train_set()) == 12
    (root / "train" / "n01443537" / "n01443537_02.JPEG").unlink()
    os.utime(root / "train" / "n01443537", ns=(1, 1))
    assert len(module(root).train_set()) == 11
    assert len(scans) == 2 * 5
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(imagenet_folder, tmp_path, cache):
    cache.write_text("a file, not a folder")
    assert len(module(imagenet_folder).train_set()) == 12


def test_names_of_any_kind(tmp_path):
    root = write_imagenet(tmp_path / "a", train=2)
    for name in ("ä ö.jpeg", "β.PNG", ".hidden.png"):
        Image.fromarray(random_images(1, 20)[0]).save(root / "train" / "n01440764" / name)
    for _ in range(2):  # scanned, then from the cache
        samples = module(root).train_set()
        names = [samples.images.path(i).name for i in range(len(samples))]
        assert names[:4] == ["n01440764_00.JPEG", "n01440764_01.JPEG", "ä ö.jpeg", "β.PNG"]
        assert samples.image(3).shape == (3, 16, 16)


# -- npz files --


@pytest.mark.parametrize("compressed", [False, True])
def test_downsampled_imagenet(tmp_path, compressed):
    images, labels = write_downsampled_imagenet(tmp_path / "a", side=16, batches=11, compressed=compressed)
    data = module(tmp_path / "a")
    data.check()
    train, test = data.train_set(), data.test_set()
    assert (len(train), len(test)) == (55, 5)
    for i in range(55):  # batch 10 comes after 9
        assert torch.equal(train.image(i), torch.from_numpy(images[i]).permute(2, 0, 1))
        assert train.label(i) == labels[i]
    assert torch.equal(test.image(2), torch.from_numpy(images[57]).permute(2, 0, 1))
    mapped = isinstance(train.images.blocks[0].array, np.memmap)
    assert mapped == (not compressed)


def test_workers_get_the_file_and_not_its_pixels(tmp_path):
    write_downsampled_imagenet(tmp_path / "a", side=16, per_batch=100)
    data = module(tmp_path / "a", num_workers=1)
    train = data.train_set()
    packed = pickle.dumps(train)
    assert len(packed) < 200 * 16 * 16 * 3 / 10
    assert torch.equal(pickle.loads(packed).image(150), train.image(150))
    for batch in islice(data.train_dataloader(), 2):
        for place in range(4):
            assert torch.equal(batch["image"][place], train.image(int(batch["index"][place])))


def test_a_single_file_of_adm_or_of_our_samples(tmp_path):
    images = random_images(12, 16)
    for names in (("arr_0", "arr_1"), ("images", "labels")):
        path = tmp_path / f"{names[0]}.npz"
        np.savez(path, **dict(zip(names, (images, np.arange(12) % 2), strict=True)))
        data = module(path)
        data.check()
        assert (len(data.train_set()), len(data.test_set())) == (9, 3)
        row = int(data.test_set().rows[1])
        assert torch.equal(data.test_set().image(1), torch.from_numpy(images[row]).permute(2, 0, 1))
        assert data.test_set().label(1) == row % 2
        assert len(module(path, test_root=str(path)).test_set()) == 12
    np.savez(tmp_path / "bare.npz", arr_0=images)
    assert module(tmp_path / "bare.npz", num_classes=0).train_set().label(0) == -1


def test_npz_files_of_something_else(tmp_path):
    path = tmp_path / "a.npz"
    images, labels = random_images(4, 16), np.arange(4) % 2
    for arrays, reason in [
        ({"pixels": images}, "it holds pixels, not data or arr_0 or images"),
        ({"images": images}, "it holds no labels; num_classes=0 trains without"),
        ({"images": images[:, :8], "labels": labels}, "its images are uint8 [4, 8, 16, 3], not uint8 [N, 16, 16, 3]"),
        ({"images": images / 255, "labels": labels}, "its images are float64 [4, 16, 16, 3], not uint8 [N, 16, 16, 3]"),
        ({"images": images[:0], "labels": labels[:0]}, "its images are uint8 [0, 16, 16, 3], not uint8 [N, 16, 16, 3]"),
        ({"data": images, "labels": labels}, "its data are uint8 [4, 16, 16, 3], not uint8 [N, 768]"),
        ({"images": images, "labels": labels[:3]}, "its labels are int64 [3], not one integer an image"),
        ({"images": images, "labels": labels / 2}, "its labels are float64 [4], not one integer an image"),
        ({"images": images, "labels": labels + 1}, "its labels are not all from 0 to 1"),
        ({"data": images.reshape(4, -1), "labels": labels}, "its labels are not all from 1 to 2"),
        ({"images": np.array([{}] * 4), "labels": labels}, "Object arrays cannot be loaded when allow_pickle=False"),
    ]:
        np.savez(path, **arrays)
        refuses(f"root={path}: cannot read a.npz ({reason})", path)
    whole = path.read_bytes()
    for damaged in (b"", b"no zip", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^root={path}: cannot read a\.npz \([^\n]+\)$"):
            module(path).check()
    with pytest.raises(ValueError, match=rf"^root={tmp_path}/none\.npz: cannot read none\.npz \(.+No such file.+\)$"):
        module(tmp_path / "none.npz").check()
