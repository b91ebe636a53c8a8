from __future__ import annotations

import logging
import os
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from denoiselab.data.image_folder import File, ImageFolder, choose_test, decode, list_images


def noise(seed, height=12, width=10, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write(root, count=10, classes=("cat", "dog")):
    for i in range(count):
        for j, name in enumerate(classes):
            (root / name).mkdir(parents=True, exist_ok=True)
            noise(100 * j + i).save(root / name / f"{i:03}.png")
    return root


def module(root, **changes):
    values = {
        "root": None if root is None else str(root),
        "test_root": None,
        "test_fraction": 0.2,
        "on_corrupt": "fail",
        "cache": False,
        "channels": 3,
        "resolution": 8,
        "num_classes": 2,
        "batch_size": 4,
        "seed": 0,
    }
    return ImageFolder(**(values | changes))


def refuses(line, root, **changes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        module(root, **changes).check()
    assert str(caught.value) == line


# -- decoding --


def test_an_image_of_the_wanted_size_is_kept_as_it_is(tmp_path):
    image = noise(0)
    image.save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", channels=3, size=(12, 10))
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("turn", [0, 1])
def test_the_shorter_side_is_scaled_and_the_centre_cut_out(tmp_path, turn):
    wide = noise(0, 6, 18, channels=1)
    Image.fromarray(np.rot90(np.array(wide), turn)).save(tmp_path / "a.png")

    def pixels(*size):
        return decode(tmp_path / "a.png", channels=1, size=size[::-1] if turn else size)[0].rot90(-turn)

    scaled = torch.from_numpy(np.array(wide.resize((9, 3), Image.Resampling.BICUBIC)))
    assert (pixels(3, 3).int() - scaled[:, 3:6].int()).abs().max() <= 1
    assert torch.equal(pixels(6, 12), torch.from_numpy(np.array(wide))[:, 3:15])


def test_shrinking_antialiases(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", channels=1, size=(8, 8)).float()
    assert (pixels - 127.5).abs().max() < 12  # skipping pixels would leave 0 or 255


def test_grey_and_rgb_become_each_other(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("L", (4, 4), 90).save(tmp_path / "grey.png")
    assert decode(tmp_path / "red.png", channels=1, size=(4, 4)).unique().tolist() == [76]  # luma of ITU-R 601
    assert (decode(tmp_path / "grey.png", channels=3, size=(4, 4)) == 90).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_other_kinds_of_pixels(tmp_path, channels):
    def corner(name):
        return decode(tmp_path / name, channels=channels, size=(4, 4))[:, 0, 0].tolist()

    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "clear_grey.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "clear_palette.png", transparency=0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 70, 70, 70])
    palette.save(tmp_path / "palette.gif")
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "white_ink.tif")
    Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(tmp_path / "black_ink.jpg")
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    for name, dtype in [("deep.png", "<u2"), ("deep.tif", "<u2")]:
        Image.fromarray(np.full((4, 4), 100 * 257, dtype=dtype)).save(tmp_path / name)
    wanted = {
        "clear.png": 255,
        "clear_grey.png": 255,
        "clear_palette.png": 255,
        "half.png": 127,
        "palette.gif": 70,
        "white_ink.tif": 255,
        "black_ink.jpg": 0,
        "bit.png": 255,
        "deep.png": 100,
        "deep.tif": 100,
    }
    assert {name: corner(name) for name in wanted} == {name: [value] * channels for name, value in wanted.items()}


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"/a\.tif has 32-bit pixels, which have no fixed range$"):
        decode(tmp_path / "a.tif", channels=1, size=(4, 4))


def test_the_orientation_that_a_camera_noted_is_applied(tmp_path):
    image = noise(0, 8, 4, channels=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    pixels = decode(tmp_path / "a.png", channels=1, size=(4, 8))
    assert torch.equal(pixels[0], torch.from_numpy(np.array(image)).rot90(-1))


# -- which files --


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path):
    write(tmp_path, classes=("b", "a", "c"))
    noise(0).save(tmp_path / "beside.png")
    data = module(tmp_path, num_classes=3)
    data.check()
    assert len(data.train_set()) == 24
    assert len(data.test_set()) == 6
    for samples in (data.train_set(), data.test_set()):
        for i in range(len(samples)):
            assert "abc"[samples[i]["label"]] == samples.files[i].path.parent.name
            assert samples[i]["image"].shape == (3, 8, 8)


def test_without_classes_folders_are_only_folders(tmp_path):
    write(tmp_path / "deep" / "deeper")
    noise(0).save(tmp_path / "top.JPG")
    data = module(tmp_path, num_classes=0, test_fraction=0.5)
    assert len(data.train_set()) + len(data.test_set()) == 21
    assert {data.train_set()[i]["label"] for i in range(len(data.train_set()))} == {-1}


def test_links_are_followed_and_no_folder_is_gone_into_twice(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root, count=2)
    write(elsewhere, count=1, classes=("more",))
    (root / "linked").symlink_to(elsewhere)
    wanted = ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png", "linked/more/000.png"]
    assert list_images(root, "") == (wanted, [])
    for folder in (root, root / "cat", root / "dog", elsewhere):
        for i in range(20):  # each leads to all others again and again
            (folder / f"loop{i}").symlink_to(root)
    assert list_images(root, "") == (wanted, [])


def test_hidden_files_and_other_files_are_ignored(tmp_path, caplog):
    write(tmp_path)
    (tmp_path / ".thumbnails").mkdir()
    noise(0).save(tmp_path / ".thumbnails" / "a.png")
    (tmp_path / "cat" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "dog" / "b.avif").write_text("not an image that we read")
    data = module(tmp_path)
    data.check()
    assert len(data.train_set()) + len(data.test_set()) == 20
    (record,) = caplog.records
    assert record.getMessage().startswith("files passed over, whose names end in none of .bmp .gif ")
    assert record.getMessage().endswith(f": 1, the first {tmp_path}/dog/b.avif")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    module(tmp_path).check()
    assert caplog.records[1].getMessage().endswith(f": 2, the first {tmp_path}/cat/notes.txt")


def test_folders_that_do_not_fit(tmp_path):
    write(tmp_path / "two")
    (tmp_path / "none").mkdir()
    write(tmp_path / "gap")
    (tmp_path / "gap" / "emu").mkdir()
    kinds = ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
    refuses(f"root={tmp_path}/missing: no such folder", tmp_path / "missing")
    refuses("num_classes=3: root has 2 class folders", tmp_path / "two", num_classes=3)
    refuses(f"root={tmp_path}/none: holds no images ({kinds})", tmp_path / "none", num_classes=0)
    refuses(f"root={tmp_path}/gap/emu: holds no images ({kinds})", tmp_path / "gap", num_classes=3)
    (tmp_path / "one").mkdir()
    noise(0).save(tmp_path / "one" / "a.png")
    refuses(
        f"root={tmp_path}/one: the test split holds no image that can be decoded",
        tmp_path / "one",
        num_classes=0,
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"test_fraction": 0.0}, "test_fraction=0.0: must be above 0 and below 1"),
        ({"test_fraction": 1.0}, "test_fraction=1.0: must be above 0 and below 1"),
        ({"on_corrupt": "ignore"}, "on_corrupt=ignore: must be fail or skip"),
    ],
)
def test_values_out_of_range(tmp_path, changes, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        module(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"^root=null: give a folder of images, datamodule.root=/path/to/images$"):
        module(None)


def test_a_check_creates_nothing(tmp_path):
    write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    module(tmp_path).check()
    assert sorted(tmp_path.rglob("*")) == before


# -- the split --


def names(samples):
    return {file.name for file in samples.files}


def test_the_split_is_stratified_and_depends_on_names_alone(tmp_path):
    write(tmp_path)
    data = module(tmp_path)
    test = names(data.test_set())
    assert sorted(name.split("/")[0] for name in test) == ["cat"] * 2 + ["dog"] * 2
    assert not test & names(data.train_set())
    (tmp_path / "moved").mkdir()
    for name in ("cat", "dog"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    assert names(module(tmp_path / "moved", seed=5, resolution=4, flip=True).test_set()) == test


def test_a_file_that_is_added_moves_at_most_one_other():
    files = [File(None, f"{c}/{i}.png", c) for c in range(2) for i in range(40)]
    for count in range(10, 80):
        old, new = choose_test(files[:count], 0.3), choose_test(files[: count + 1], 0.3)
        moved = (old ^ new) - {files[count].name}
        assert len(moved) <= 1


def test_every_class_is_in_both_splits():
    files = [File(None, f"{c}/{i}.png", c) for c in range(3) for i in range(2 + c)]
    for fraction in (0.01, 0.5, 0.99):
        chosen = choose_test(files, fraction)
        for c in range(3):
            assert 1 <= sum(name.startswith(f"{c}/") for name in chosen) <= 1 + c


def test_a_folder_of_its_own_for_testing(tmp_path):
    write(tmp_path / "train")
    write(tmp_path / "test", count=3)
    data = module(tmp_path / "train", test_root=str(tmp_path / "test"))
    data.check()
    assert (len(data.train_set()), len(data.test_set())) == (20, 6)
    assert [data.test_set().label(i) for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_a_test_folder_that_does_not_fit(tmp_path):
    root = write(tmp_path / "train")
    write(tmp_path / "other", classes=("cat", "emu"))
    write(tmp_path / "one", classes=("cat",))
    for name, line in [
        ("missing", f"test_root={tmp_path}/missing: no such folder"),
        ("other", f"test_root={tmp_path}/other: must have the same class folders as root={root}"),
        ("one", "num_classes=2: test_root has 1 class folders"),
    ]:
        refuses(line, root, test_root=str(tmp_path / name))
    for inside in ("train", "train/cat"):
        line = f"test_root={tmp_path}/{inside}: must lie outside of root={root} and not around it"
        refuses(line, root, test_root=str(tmp_path / inside), num_classes=0)


# -- broken files --


def spoil(root):
    """Four files that are broken in four ways, all in the class cat."""
    noise(0, 40, 40).save(root / "cat" / "cut.jpg")
    noise(0, 40, 40).save(root / "cat" / "cut2.png")
    for name in ("cut.jpg", "cut2.png"):
        data = (root / "cat" / name).read_bytes()
        (root / "cat" / name).write_bytes(data[: len(data) // 2])
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "cat" / "text.png").write_text("this is no image")
    return ["cut.jpg", "cut2.png", "empty.png", "text.png"]


def test_broken_files_are_refused_by_name_in_one_line(tmp_path):
    write(tmp_path)
    for name in spoil(tmp_path):
        lone = tmp_path / "lone" / name
        write(lone)
        os.rename(tmp_path / "cat" / name, lone / "cat" / name)
        with pytest.raises(ValueError, match=r"^on_corrupt=fail: 1 of 21 files cannot be decoded: ") as caught:
            module(lone).check()
        line = str(caught.value)
        assert f": {lone}/cat/{name} is " in line
        assert line.endswith("; repair or remove them, or set on_corrupt=skip")
        assert "\n" not in line


def test_many_broken_files_are_counted(tmp_path):
    spoil(write(tmp_path))
    with pytest.raises(ValueError, match=r"4 of 24 files cannot be decoded: .*, \.\.\.; repair") as caught:
        module(tmp_path).check()
    assert str(caught.value).count(str(tmp_path)) == 3


@pytest.mark.parametrize("cache", [False, True])
def test_broken_files_are_skipped_with_one_warning(tmp_path, caplog, cache):
    write(tmp_path / "good")
    write(tmp_path / "bad")
    bad = spoil(tmp_path / "bad")
    data = module(tmp_path / "bad", on_corrupt="skip", cache=cache)
    with caplog.at_level(logging.WARNING, logger="denoiselab"):
        data.check()
        data.check()
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("denoiselab")]
    assert line.startswith("on_corrupt=skip: 4 of 24 files cannot be decoded: ")
    assert line.endswith("; left out")
    assert "\n" not in line
    assert sum(f"{tmp_path}/bad/cat/{name}" in line for name in bad) == 3
    assert len(data.train_set()) + len(data.test_set()) == 20
    for split in (data.train_set(), data.test_set()):
        for i in range(len(split)):
            assert split[i]["image"].shape == (3, 8, 8)


def test_a_broken_file_keeps_its_place_in_the_split(tmp_path):
    """Otherwise repairing one file would reshuffle the others."""
    write(tmp_path)
    whole = module(tmp_path)
    train, test = names(whole.train_set()), names(whole.test_set())
    victim = sorted(test)[0]
    (tmp_path / victim).write_bytes(b"")
    broken = module(tmp_path, on_corrupt="skip")
    assert names(broken.train_set()) == train
    assert names(broken.test_set()) == test - {victim}


def test_a_file_that_breaks_after_the_scan(tmp_path, caplog):
    write(tmp_path)
    strict, lenient, kept = (module(tmp_path, **c) for c in ({}, {"on_corrupt": "skip"}, {"cache": True}))
    before = [data.fingerprint("train") for data in (strict, lenient, kept)]
    victim = lenient.train_set().files[2]
    pixels = kept.train_set()[2]["image"]
    victim.path.unlink()
    with pytest.raises(ValueError, match=rf"^{victim.path} is missing; repair or remove it, or set on_corrupt=skip$"):
        strict.train_set()[2]
    with caplog.at_level(logging.WARNING, logger="denoiselab"):
        sample = lenient.train_set()[2]
        assert torch.equal(lenient.train_set()[2]["image"], sample["image"])
    assert (sample["stand_in"], sample["label"], sample["index"]) == (1, victim.label, 2)
    others = [i for i, file in enumerate(lenient.train_set().files) if file.label == victim.label and i != 2]
    assert any(torch.equal(sample["image"], lenient.train_set().image(i)) for i in others)
    (record,) = caplog.records
    assert record.getMessage() == f"on_corrupt=skip: {victim.path} is missing; an image of the same class stands in"
    assert torch.equal(kept.train_set()[2]["image"], pixels)
    assert [data.fingerprint("train") for data in (strict, lenient, kept)] == before  # of what was scanned
    assert module(tmp_path, on_corrupt="skip").fingerprint("train") not in before


def test_what_is_left_out_changes_the_fingerprint(tmp_path):
    write(tmp_path)
    whole = module(tmp_path, on_corrupt="skip")
    prints = {split: whole.fingerprint(split) for split in ("train", "test")}
    victim = sorted(names(whole.test_set()))[0]
    data = (tmp_path / victim).read_bytes()
    (tmp_path / victim).write_bytes(data[:-30])
    broken = module(tmp_path, on_corrupt="skip")
    assert broken.fingerprint("train") == prints["train"]
    assert broken.fingerprint("test") != prints["test"]
    (tmp_path / victim).write_bytes(data)
    assert module(tmp_path, on_corrupt="skip").fingerprint("test") == prints["test"]


def test_nothing_but_broken_files(tmp_path):
    write(tmp_path, classes=("cat",))
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(b"")
    line = f"root={tmp_path}: the train split holds no image that can be decoded"
    refuses(line, tmp_path, num_classes=1, on_corrupt="skip")


# -- the whole --


def test_cache_and_workers_change_nothing(tmp_path):
    write(tmp_path)
    slow, fast = module(tmp_path, flip=True), module(tmp_path, flip=True, cache=True, num_workers=2)
    reading = module(tmp_path, flip=True, num_workers=2)
    for split in ("train", "test"):
        assert slow.fingerprint(split) == fast.fingerprint(split)
    loaders = [data.train_dataloader() for data in (slow, fast, reading)]
    for batches in zip(*(islice(loader, 6) for loader in loaders), strict=True):
        assert all(torch.equal(batches[0][key], b[key]) for b in batches[1:] for key in b)
    assert all(not data.test_set().flip and data.train_set().flip for data in (slow, fast))


def test_the_fingerprint_is_of_pixels_and_labels(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    plain = module(tmp_path / "a").fingerprint("train")
    assert module(tmp_path / "b").fingerprint("train") == plain
    assert module(tmp_path / "a", channels=1).fingerprint("train") != plain
    assert module(tmp_path / "a", resolution=[8, 4]).fingerprint("train") != plain
    assert module(tmp_path / "a", num_classes=0).fingerprint("train") != plain
    data = module(tmp_path / "b")
    noise(77).save(data.train_set().files[3].path)
    assert module(tmp_path / "b").fingerprint("train") != plain
