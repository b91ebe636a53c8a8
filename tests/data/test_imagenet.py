from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import tracemalloc
import zipfile
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


def draw(data, count):
    """Batches of training; a loader that an error's traceback holds on to would close slowly."""
    iterator = iter(data.train_dataloader())
    try:
        return list(islice(iterator, count))
    finally:
        if data.num_workers:
            iterator._shutdown_workers()


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
    hint = "; repair or remove it, or set on_corrupt=skip"
    refuses(f"root={root}: {paths[0]} is no image (BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP){hint}", root)
    for workers in (0, 1):
        data = module(root, num_workers=workers)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
            draw(data, 8)
        assert str(caught.value) in (
            f"{paths[0]} is no image (BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP){hint}",
            f"{paths[4]} is cut short{hint}",
        )


# -- broken images --


def spoil(root, *, empty=(), cut=()):
    """Spoil training images of `write_imagenet` by their numbers; returns all paths."""
    paths = sorted((root / "train").rglob("*.JPEG"))
    for i in empty:
        paths[i].write_bytes(b"")
    for i in cut:
        paths[i].write_bytes(paths[i].read_bytes()[:-200])
    return paths


def test_under_skip_an_image_of_the_same_class_and_split_stands_in(tmp_path, caplog):
    root = write_imagenet(tmp_path / "a", train=12, val=0)
    whole = module(root)
    spoil(root, cut=[1, 4, 13, 17, 18])
    data = module(root, on_corrupt="skip", num_workers=2)
    for good, samples in ((whole.train_set(), data.train_set()), (whole.test_set(), data.test_set())):
        broken = [i for i in range(len(samples)) if int(samples.rows[i]) in (1, 4, 13, 17, 18)]
        for i in range(len(samples)):
            sample = samples[i]
            assert (sample["stand_in"], sample["label"]) == (int(i in broken), good.label(i))
            same = [j for j in samples.peers(i) if j not in broken and torch.equal(samples.image(j), sample["image"])]
            assert same == [i] if i not in broken else len(same) == 1
            assert all(samples.label(j) == samples.label(i) for j in same)
        assert torch.equal(samples.image(broken[0]), samples[broken[0]]["image"])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert all(line.endswith(".JPEG is cut short; an image of the same class stands in") for line in lines)


def test_stand_ins_do_not_depend_on_workers_or_history(tmp_path, monkeypatch):
    root = write_imagenet(tmp_path / "a", train=6)
    spoil(root, cut=[0, 5, 7])
    everyone = logging.FileHandler(tmp_path / "log")  # workers write to it as well, if they say anything
    monkeypatch.setattr(logging.getLogger("denoiselab.data.dataset"), "handlers", [everyone])
    runs = [module(root, on_corrupt="skip", num_workers=n, flip=True) for n in (0, 2)]
    alone, shared = (list(islice(data.train_dataloader(), 9)) for data in runs)
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert one["stand_in"].dtype == torch.int64
        assert torch.equal(one["stand_in"] == 1, torch.isin(one["index"], torch.tensor([0, 5, 7])))
    assert len((tmp_path / "log").read_text().splitlines()) == 3  # by the process that trains, once for each
    drawn = torch.cat([batch["index"][batch["stand_in"] > 0] for batch in shared]).tolist()
    for _ in range(2):
        runs[1].train_set().tell(drawn)
    assert len((tmp_path / "log").read_text().splitlines()) == 6


def test_empty_files_are_found_at_the_start(tmp_path, caplog):
    root = write_imagenet(tmp_path / "a")
    paths = spoil(root, empty=[1, 3, 8, 9])
    line = f"4 of 12 files cannot be decoded: {paths[1]} is empty, {paths[3]} is empty, {paths[8]} is empty, ..."
    refuses(f"root={root}: on_corrupt=fail: {line}; repair or remove them, or set on_corrupt=skip", root)
    paths[3].unlink()
    paths[3].symlink_to("nothing")
    module(root, on_corrupt="skip").check()
    line = line.replace(f"{paths[3]} is empty", f"{paths[3]} is missing")
    assert [r.getMessage() for r in caplog.records] == [f"on_corrupt=skip: {line}; others of their class stand in"]


def test_a_class_without_a_good_image_takes_from_the_others_and_a_set_without_one_is_an_error(tmp_path):
    root = write_imagenet(tmp_path / "a", train=4)
    spoil(root, cut=range(4))
    data = module(root, on_corrupt="skip", num_workers=1)
    assert data.train_set()[5]["stand_in"] == 0
    assert (data.train_set()[1]["stand_in"], data.train_set()[1]["label"]) == (1, 1)
    batches = draw(data, 4)
    assert {label for batch in batches for label in batch["label"].tolist()} == {1}
    spoil(root, cut=range(4, 8))
    line = r"\S+ is cut short; \d others were tried in its place, the last: \S+ is cut short$"
    with pytest.raises(ValueError, match=f"^{line}"):
        draw(data, 4)
    with pytest.raises(ValueError, match=f"^root={root}: {line}"):
        module(root, on_corrupt="skip", test_root=str(root / "train")).check()


def test_verify_finds_broken_files_and_one_changed_byte(tmp_path, caplog):
    root = write_imagenet(tmp_path / "a")
    first = {verify: module(root, verify=verify).fingerprint("train") for verify in (False, True)}
    assert len(set(first.values())) == 2
    path = sorted((root / "train").rglob("*.JPEG"))[7]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert module(root).fingerprint("train") == first[False]  # of names and sizes
    changed = module(root, verify=True)
    assert changed.fingerprint("train") != first[True]
    assert changed.fingerprint("test") == module(root, verify=True).fingerprint("test")
    assert changed.train_set().digest(7) == hashlib.sha256(changed.train_set().image(7).numpy().tobytes()).digest()
    path.write_bytes(data[:-200])
    refuses(
        f"root={root}: on_corrupt=fail: 1 of 12 files cannot be decoded: {path} is cut short; "
        "repair or remove them, or set on_corrupt=skip",
        root,
        verify=True,
    )
    skipping = module(root, verify=True, on_corrupt="skip")
    assert skipping.fingerprint("train") not in (*first.values(), changed.fingerprint("train"))
    assert skipping.train_set()[7]["stand_in"] == 1
    (line,) = {record.getMessage() for record in caplog.records if "1 of 12" in record.getMessage()}
    assert line.endswith(f": {path} is cut short; others of their class stand in")


def test_a_policy_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"^on_corrupt=ignore: must be fail or skip$"):
        module(tmp_path, on_corrupt="ignore")


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


def test_a_file_that_is_written_to_in_place_is_seen_by_its_size(tmp_path):
    root = write_imagenet(tmp_path / "a")
    before = module(root).fingerprint("train")
    path = root / "train" / "n01443537" / "n01443537_02.JPEG"
    changed = path.parent.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"more")
    assert path.parent.stat().st_mtime_ns == changed
    assert module(root).fingerprint("train") != before


def test_files_that_are_passed_over_are_counted(tmp_path, caplog):
    root = write_imagenet(tmp_path / "a")
    for name in ("n01443537/a.avif", "n01440764/b.txt", "n01440764/.hidden"):
        (root / "train" / name).write_bytes(b"")
    (root / "train" / "n01440764" / "folder").mkdir()
    for _ in range(2):  # scanned, then from the cache
        assert len(module(root).train_set()) == 12
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(line.endswith(f": 2, the first {root}/train/n01440764/b.txt") for line in lines)


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


def test_npz_files_that_unpack_to_too_much(tmp_path):
    path, large = tmp_path / "a.npz", 2**20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (150 * large // 768, 16, 16, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(150):
            member.write(bytes(large))
    size, unpacked = path.stat().st_size, 150 * large + 128
    line = f"root={path}: cannot read a.npz (it has {size:,} bytes and would unpack to {unpacked:,})"
    tracemalloc.start()
    refuses(line, path, num_classes=0)
    assert tracemalloc.get_traced_memory()[1] < large
    tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npz_array_has_the_bytes_that_its_shape_takes(tmp_path, method):
    path = tmp_path / "a.npz"
    for count in (3, 5, 10**12):
        with zipfile.ZipFile(path, "w", method) as archive, archive.open("arr_0.npy", "w") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 16, 16, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(4 * 16 * 16 * 3))
        reason = f"its arr_0.npy has not as many bytes as uint8 [{count}, 16, 16, 3] takes"
        refuses(f"root={path}: cannot read a.npz ({reason})", path, num_classes=0)


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
