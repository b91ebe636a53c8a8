"""Small files in the layouts of published data sets and weights, made up here."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from typing import ClassVar

import numpy as np
import torch
from PIL import Image


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its text, and numpy's names as they were then."""

    def save_str(self, data):
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(data)) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch: ClassVar = pickle._Pickler.dispatch | {bytes: save_str}


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class Python2Array:
    """An array that reduces to what Python 2 pickled: its bytes are text."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        rebuild, arguments, _ = self.array.__reduce__()
        dtype = np.dtype(self.array.dtype)
        return rebuild, arguments, (1, self.array.shape, dtype, False, self.array.tobytes())


def random_images(count, side, seed=0):
    """uint8 of shape (count, side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_cifar10(folder, per_batch):
    """The six batches of cifar-10-batches-py; returns the training images (N, 32, 32, 3) and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = random_images(6 * per_batch, 32), [(7 * i) % 10 for i in range(6 * per_batch)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(i * per_batch, (i + 1) * per_batch)
        pixels = np.ascontiguousarray(images[part].transpose(0, 3, 1, 2)).reshape(per_batch, 3072)
        batch = {b"batch_label": name.encode(), b"labels": labels[part], b"data": Python2Array(pixels)}
        (folder / name).write_bytes(python2_pickle(batch))
    return images[: 5 * per_batch], labels[: 5 * per_batch]


def write_edm_zip(path, images, labels):
    """PNG files and dataset.json, as EDM's dataset_tool.py packs images (N, H, W, 3) and labels (None for none)."""
    names = [f"{i // 1000:05}/img{i:08}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="png", compress_level=0)
            archive.writestr(name, file.getvalue())
        pairs = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


def write_imagenet(root, *, train=6, val=3, classes=("n01440764", "n01443537")):
    """JPEG files of several sizes in a folder per class, below train and, if there are any, val."""
    for part, count in (("train", train), ("val", val)):
        for j, name in enumerate(classes if count else ()):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = random_images(1, 60 + i, seed=100 * j + i)[0, : 40 + 2 * i]
                Image.fromarray(image).save(root / part / name / f"{name}_{i:02}.JPEG", format="jpeg", quality=90)
    return root


def write_downsampled_imagenet(root, *, side, batches=2, per_batch=5, classes=2, compressed=False):
    """train_data_batch_*.npz and val_data.npz of downsampled ImageNet; returns the images (N, H, W, 3) and labels."""
    root.mkdir(parents=True, exist_ok=True)
    images = random_images((batches + 1) * per_batch, side)
    labels = np.arange(len(images)) % classes
    save = np.savez_compressed if compressed else np.savez
    for i, name in enumerate([*(f"train_data_batch_{k + 1}" for k in range(batches)), "val_data"]):
        part = slice(i * per_batch, (i + 1) * per_batch)
        flat = images[part].transpose(0, 3, 1, 2).reshape(per_batch, -1)
        save(root / f"{name}.npz", data=flat, labels=labels[part] + 1, mean=flat.mean(0))
    return images, labels


def write_autoencoder(folder):
    """A tiny AutoencoderKL with random weights in diffusers' layout: RGB, 4 channels of a half of the sides."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 8}
    AutoencoderKL(**blocks, **shape).save_pretrained(folder)
    return folder


def held(images, batch_size):
    """A source of images (see `evaluation.generate.Source`) that are in memory."""
    return lambda numbers: ((index, images[index]) for index in torch.as_tensor(numbers).split(batch_size))
