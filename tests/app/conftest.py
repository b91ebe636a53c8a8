from __future__ import annotations

import os

import numpy as np
import pytest
from calls import RUN, only_run, run_script
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """The reference statistics of these tests are theirs, shared among them, and never in the user's cache."""
    before = os.environ.get("DENOISELAB_CACHE")
    os.environ["DENOISELAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DENOISELAB_CACHE"]
    if before is not None:
        os.environ["DENOISELAB_CACHE"] = before


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """What `python scripts/train.py` printed, and the working folder that it was started in."""
    cwd = tmp_path_factory.mktemp("trained")
    done = run_script("train", *RUN, cwd=cwd, COLUMNS="200")
    assert done.code == 0, done.err
    return done, cwd


@pytest.fixture(scope="session")
def tiny_run(trained):
    """The folder of a short run on the digits."""
    return only_run(trained[1])


def _write_images(root, classes):
    """Eight RGB images of 40x36, in a subfolder per class."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 40, 36, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = root / f"class_{i % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of images without classes."""
    return _write_images(tmp_path_factory.mktemp("images"), 0)


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """A folder of images in two classes."""
    return _write_images(tmp_path_factory.mktemp("classes"), 2)


@pytest.fixture(scope="session")
def fashion_folder(tmp_path_factory):
    """Fashion-MNIST's four IDX files with ten images each."""
    root = tmp_path_factory.mktemp("fashion")
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"\x00\x00\x08\x03" + np.array(images.shape, ">i4").tobytes()
        (root / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"\x00\x00\x08\x01" + np.array([10], ">i4").tobytes()
        (root / f"{part}-labels-idx1-ubyte").write_bytes(header + np.arange(10, dtype=np.uint8).tobytes())
    return root
