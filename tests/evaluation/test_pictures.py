from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from denoiselab.evaluation.pictures import image_grid, read_images, save_images, to_pil


def random_images(count, channels=1, height=8, width=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


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
    refused(tmp_path / "missing.npz", 1, "no npz, and no folder with PNG files")
    refused(tmp_path, 1, "no npz, and no folder with PNG files")
    np.savez(tmp_path / "a.npz", pictures=np.zeros(3))
    refused(tmp_path / "a.npz", 1, "has no array `images`")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 4, 4, 3)))
    refused(tmp_path / "b.npz", 3, r"must be uint8 of shape \(N, H, W, 3\), not float64 \(2, 4, 4, 3\)")
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    refused(tmp_path / "c.npz", 1, r"must be uint8 of shape \(N, H, W, 1\)")
    for side in (4, 5):
        Image.new("L", (side, side)).save(tmp_path / f"{side}.png")
    refused(tmp_path, 1, "must all be of one size")


def test_pickles_in_an_npz_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_images(tmp_path / "a.npz", 1)
