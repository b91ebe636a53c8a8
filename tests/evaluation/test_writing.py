from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from denoiselab.evaluation.writing import (
    check_folder,
    difference,
    picture_path,
    pictures_left,
    remove_partial,
    replacing,
    shard_path,
    shards,
    shards_left,
    write_npz,
    write_pngs,
)
from stand_ins import held


def random_images(count, channels=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, 5, 6), generator=generator, dtype=torch.uint8)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class CutError(Exception):
    """Whatever ends a job."""


def interrupted(images, after):
    """A source that fails after some images."""

    def source(numbers):
        for number in numbers[:after]:
            yield torch.tensor([number]), images[[number]]
        raise CutError

    return source


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(10, 5, [(0, 5), (5, 10)]), (11, 5, [(0, 5), (5, 10), (10, 11)]), (3, 5, [(0, 3)]), (0, 5, [])],
)
def test_shards_hold_each_number_once(count, size, expected):
    assert shards(count, size) == [range(*ends) for ends in expected]


def test_names_sort_by_number(tmp_path):
    assert shard_path(tmp_path, range(5000, 10000)).name == "005000-009999.npz"
    assert picture_path(tmp_path, 12, None) == tmp_path / "000012.png"
    assert picture_path(tmp_path, 12, 3) == tmp_path / "003" / "000012.png"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_what_numpy_reads(tmp_path, channels):
    images, labels, told = random_images(12, channels), torch.arange(12) % 5, []
    write_npz(tmp_path / "a.npz", held(images, 4), range(2, 12), labels, told.append)
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays.files) == ["images", "labels"]
        assert (arrays["images"].dtype, arrays["labels"].dtype) == (np.uint8, np.int64)
        assert np.array_equal(arrays["images"], images[2:].permute(0, 2, 3, 1).numpy())
        assert np.array_equal(arrays["labels"], labels[2:].numpy())
    assert told == [4, 4, 2]
    assert names(tmp_path) == ["a.npz"]


def test_without_classes_labels_are_minus_one(tmp_path):
    write_npz(tmp_path / "a.npz", held(random_images(3), 2), range(3), None, lambda count: None)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["labels"].tolist() == [-1] * 3


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_of_some_numbers(tmp_path, channels):
    images, labels, told = random_images(9, channels), torch.arange(9) % 2, []
    write_pngs(tmp_path, held(images, 2), [7, 1, 4], labels, told.append)
    assert names(tmp_path) == ["000001.png", "000004.png", "000007.png"]
    found = np.asarray(Image.open(tmp_path / "001" / "000007.png")).reshape(5, 6, channels)
    assert np.array_equal(found, images[7].permute(1, 2, 0).numpy())
    assert told == [2, 1]


def test_one_batch_is_in_memory_at_a_time(tmp_path):
    given: list[weakref.ref] = []

    def source(numbers):
        for number in numbers:
            assert sum(ref() is not None for ref in given) <= 1
            images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
            given.append(weakref.ref(images))
            yield torch.tensor([number]), images
            del images

    write_npz(tmp_path / "a.npz", source, range(8), None, lambda count: None)
    write_pngs(tmp_path, source, range(8), None, lambda count: None)
    assert len(given) == 16


def test_what_is_interrupted_leaves_nothing_half_written(tmp_path):
    images = random_images(8)
    with pytest.raises(CutError):
        write_npz(tmp_path / "a.npz", interrupted(images, 5), range(8), None, lambda count: None)
    assert names(tmp_path) == []
    with pytest.raises(CutError):
        write_pngs(tmp_path, interrupted(images, 3), range(8), None, lambda count: None)
    assert names(tmp_path) == ["000000.png", "000001.png", "000002.png"]
    assert pictures_left(tmp_path, 8) == [3, 4, 5, 6, 7]


def test_a_file_takes_its_place_at_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"half")
            raise CutError

    with pytest.raises(CutError):
        fail()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


def test_what_is_left_to_draw(tmp_path):
    for name in ("000000-000003.npz", ".000004-000007.npz.0a1b2c3d.partial", "000008-000009.npz"):
        (tmp_path / name).write_bytes(b"")
    assert shards_left(tmp_path, 10, 4) == [range(4, 8)]
    for name in ("003/000003.png", "001/000001.png", "001/.000011.png.0a1b2c3d.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert pictures_left(tmp_path, 5) == [0, 2, 4]
    remove_partial(tmp_path)
    assert names(tmp_path) == ["000000-000003.npz", "000001.png", "000003.png", "000008-000009.npz"]


PROTOCOL = {"checkpoint": "a.ckpt", "seed": 0, "sampler": {"grid": {"rho": 7.0}, "nfe": 20}, "class": None}


def test_a_folder_of_the_same_protocol_goes_on(tmp_path):
    check_folder(tmp_path / "missing", PROTOCOL)
    check_folder(tmp_path, PROTOCOL)
    (tmp_path / "protocol.json").write_text(json.dumps(PROTOCOL))
    (tmp_path / "000000.png").write_bytes(b"")
    check_folder(tmp_path, PROTOCOL | {"checkpoint": "the/same/weights/elsewhere.ckpt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed is 0 there, here it is 1;"),
        ({"sampler": {"grid": {"rho": 5.0}, "nfe": 20}}, "sampler.grid.rho is 7.0 there, here it is 5.0;"),
        ({"class": [3]}, "class is null there, here it is [3];"),
        ({"shard": 10}, "shard is null there, here it is 10;"),
    ],
)
def test_a_folder_of_another_protocol_is_refused(tmp_path, change, said):
    (tmp_path / "protocol.json").write_text(json.dumps(PROTOCOL))
    with pytest.raises(ValueError, match="^output=") as caught:
        check_folder(tmp_path, PROTOCOL | change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds images, but no protocol.json"):
        check_folder(tmp_path, PROTOCOL)
    for text in ("{", "[]", "\x00", "[" * 100_000):
        (tmp_path / "protocol.json").write_text(text)
        with pytest.raises(ValueError, match="its protocol.json cannot be read"):
            check_folder(tmp_path, PROTOCOL)


def test_the_first_difference():
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert difference({"a": {"b": 1}}, {"a": 3}) == ("a", {"b": 1}, 3)
