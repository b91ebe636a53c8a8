from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from denoiselab.evaluation.pictures import image_grid, read_images, stored_images, stored_protocol, to_pil
from denoiselab.evaluation.writing import shard_path, shards, write_npz, write_pngs
from stand_ins import held


def random_images(count, channels=1, height=8, width=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def save_images(images, labels, folder):
    """As PNG files."""
    write_pngs(folder, held(images, 5), range(len(images)), labels, lambda count: None)


def save_shards(images, labels, folder, size):
    """As npz files."""
    folder.mkdir(exist_ok=True)
    for numbers in shards(len(images), size):
        write_npz(shard_path(folder, numbers), held(images, 2), numbers, labels, lambda count: None)


@pytest.mark.parametrize(
    ("count", "columns", "channels", "height", "width", "zoom"),
    [
        (6, 3, 1, 8, 8, 6),
        (7, 3, 3, 8, 8, 6),  # the last row is not full
        (2, 5, 1, 8, 8, 6),  # fewer images than columns
        (4, 2, 3, 5, 9, 10),  # 50 pixels high at least 48
        (4, 2, 1, 48, 32, 1),
        (1, 1, 3, 100, 60, 1),
    ],
)
def test_a_grid_pixel_by_pixel(count, columns, channels, height, width, zoom):
    images, border = random_images(count, channels, height, width), 3
    picture = image_grid(images, columns, border=border)
    assert picture.mode == {1: "L", 3: "RGB"}[channels]
    rows, shown = -(-count // columns), min(columns, count)
    expected = np.full(
        (rows * (height * zoom + border) + border, shown * (width * zoom + border) + border, channels), 255, np.uint8
    )
    for y in range(expected.shape[0]):
        for x in range(expected.shape[1]):
            row, inner_y = divmod(y - border, height * zoom + border)
            column, inner_x = divmod(x - border, width * zoom + border)
            i = row * columns + column
            inside = 0 <= inner_y < height * zoom and 0 <= inner_x < width * zoom
            if inside and row >= 0 and 0 <= column < columns and i < count:
                expected[y, x] = images[i, :, inner_y // zoom, inner_x // zoom].numpy()
    assert np.array_equal(np.asarray(picture).reshape(expected.shape), expected)


def test_grey_and_colour():
    assert to_pil(np.zeros((4, 5, 1), np.uint8)).mode == "L"
    assert to_pil(np.zeros((4, 5, 3), np.uint8)).size == (5, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_goes_round(tmp_path, channels):
    images = random_images(12, channels)
    save_images(images, None, tmp_path / "flat")
    read, labels = read_images(tmp_path / "flat", channels)
    assert torch.equal(read, images)
    assert labels.tolist() == [-1] * 12
    assert sorted(p.name for p in (tmp_path / "flat").iterdir())[:2] == ["000000.png", "000001.png"]


def test_order_and_labels_of_a_folder_are_kept(tmp_path):
    images, labels = random_images(12), torch.arange(12) % 10
    save_images(images, labels, tmp_path)
    assert (tmp_path / "003" / "000003.png").is_file()
    read, found = read_images(tmp_path, 1)
    assert torch.equal(read, images)
    assert torch.equal(found, labels)
    assert found.dtype == torch.int64


def test_labels_of_some_classes_only_are_kept(tmp_path):
    labels = torch.tensor([3, 5, 3])
    save_images(random_images(3), labels, tmp_path)
    assert torch.equal(read_images(tmp_path, 1)[1], labels)


def test_subfolders_with_names_are_classes_in_the_order_of_their_names(tmp_path):
    for i, name in enumerate(["cat", "ant", "bee"]):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), i).save(tmp_path / name / f"{i}.png")
    images, labels = read_images(tmp_path, 1)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_shards_goes_round(tmp_path, channels):
    images, labels = random_images(12, channels, 6, 9), torch.arange(12) % 5
    save_shards(images, labels, tmp_path / "s", 5)
    read, found = read_images(tmp_path / "s", channels)
    assert torch.equal(read, images)
    assert torch.equal(found, labels)
    save_shards(images, None, tmp_path / "t", 4)
    assert read_images(tmp_path / "t", channels)[1].tolist() == [-1] * 12


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_some_images_in_any_order(tmp_path, kind):
    images = random_images(12)
    save_images(images, None, tmp_path) if kind == "png" else save_shards(images, None, tmp_path, 5)
    source, labels = stored_images(tmp_path, 1, batch_size=3)
    assert len(labels) == 12
    wanted = [11, 0, 5, 4, 1, 10, 2]
    numbers, found = zip(*source(wanted), strict=True)
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert torch.cat(numbers).tolist() == wanted
    assert torch.equal(torch.cat(found), images[wanted])


def test_shards_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    save_shards(random_images(12), None, tmp_path, 4)
    source, _ = stored_images(tmp_path, 1, batch_size=2)
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda file, *args: opened.append(file.name) or load(file, *args))
    list(source(range(4, 12)))
    assert opened == ["000004-000007.npz", "000008-000011.npz"]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_goes_round(tmp_path, channels):
    images, labels = random_images(5, channels, 6, 9), torch.tensor([4, 2, 2, 0, 9])
    file = tmp_path / "a.npz"
    np.savez_compressed(file, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    read, found = read_images(file, channels)
    assert torch.equal(read, images)
    assert torch.equal(found, labels)
    assert read.is_contiguous()


def test_an_npz_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 1), np.uint8))
    assert read_images(tmp_path / "a.npz", 1)[1].tolist() == [-1, -1]


def test_grey_files_are_read_as_colour_where_that_is_asked_for(tmp_path):
    images = random_images(2)
    save_images(images, None, tmp_path)
    assert torch.equal(read_images(tmp_path, 3)[0], images.expand(-1, 3, -1, -1))


def refused(source, channels, message):
    with pytest.raises(ValueError, match=re.escape(f"images={source}: ") + message) as caught:
        read_images(source, channels)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read(tmp_path):
    refused(tmp_path / "missing.npz", 1, "no npz, and no folder with npz or PNG files")
    refused(tmp_path, 1, "no npz, and no folder with npz or PNG files")
    np.savez(tmp_path / "a.npz", pictures=np.zeros(3))
    refused(tmp_path / "a.npz", 1, "has no array `images`")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 4, 4, 3)))
    refused(tmp_path / "b.npz", 3, r"must be uint8 of shape \(N, H, W, 3\), not float64 \(2, 4, 4, 3\)")
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    refused(tmp_path / "c.npz", 1, r"must be uint8 of shape \(N, H, W, 1\)")
    (tmp_path / "sizes").mkdir()
    for side in (4, 5):
        Image.new("L", (side, side)).save(tmp_path / "sizes" / f"{side}.png")
    refused(tmp_path / "sizes", 1, "must all be of one size")


def test_pickles_in_an_npz_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object))
    refused(tmp_path / "a.npz", 1, "must hold numbers, not Python objects")
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 4, 4, 1), np.uint8), labels=np.array([{"a": 1}], dtype=object))
    refused(tmp_path / "b.npz", 1, r"cannot be read \(.*allow_pickle")


def damaged(source, file):
    """What is said of a damaged file of a source."""
    with pytest.raises(ValueError, match=re.escape(f"images={file}: cannot be read (")) as caught:
        read_images(source, 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["png", "npz"])
def test_files_that_were_cut_are_named(tmp_path, kind, share):
    images = random_images(6, 1, 32, 32)
    save_images(images, None, tmp_path) if kind == "png" else save_shards(images, None, tmp_path, 3)
    file = sorted(tmp_path.iterdir())[1]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    damaged(tmp_path, file)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_files_with_a_wrong_byte_are_named(tmp_path, kind):
    images = random_images(6, 1, 32, 32)
    save_images(images, None, tmp_path) if kind == "png" else save_shards(images, None, tmp_path, 3)
    file = sorted(tmp_path.iterdir())[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    damaged(tmp_path, file)


def test_what_is_no_image_is_named(tmp_path):
    for name, content in (("a.npz", b"text"), ("b.npz", b""), ("c.npz", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
        damaged(tmp_path / name, tmp_path / name)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_text("text")
    damaged(tmp_path / "p", tmp_path / "p" / "a.png")
    with (tmp_path / "d.npz").open("wb") as file:
        np.save(file, np.zeros((2, 4, 4, 1), np.uint8))
    damaged(tmp_path / "d.npz", tmp_path / "d.npz")


def test_a_folder_has_one_kind_and_one_size(tmp_path):
    save_shards(random_images(4), None, tmp_path, 2)
    np.savez(tmp_path / "000002-000003.npz", images=np.zeros((2, 5, 5, 1), np.uint8))
    refused(tmp_path, 1, "must all be of one size")
    save_images(random_images(2), None, tmp_path)
    refused(tmp_path, 1, "has npz and PNG files")


def test_a_folder_that_is_not_finished_is_refused(tmp_path):
    save_shards(random_images(4), None, tmp_path, 2)
    (tmp_path / "protocol.json").write_text(json.dumps({"num_samples": 4}))
    assert len(read_images(tmp_path, 1)[1]) == 4
    (tmp_path / "000002-000003.npz").unlink()
    refused(tmp_path, 1, "has 2 of the 4 images of its protocol.json")
    for text in ("{", "[" * 100_000):
        (tmp_path / "protocol.json").write_text(text)
        damaged(tmp_path, tmp_path / "protocol.json")


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, "\x00"])
def test_a_protocol_that_is_none_says_nothing(tmp_path, text):
    save_shards(random_images(4), None, tmp_path, 4)
    (tmp_path / "protocol.json").write_text(text)
    assert list(stored_protocol(tmp_path)) == ["images_sha256"]
    (tmp_path / "protocol.json").unlink()
    os.mkfifo(tmp_path / "protocol.json")
    assert list(stored_protocol(tmp_path)) == ["images_sha256"]
