from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from denoiselab.data import fashion_mnist
from denoiselab.data.fashion_mnist import FashionMnist


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder, *, packed, side=28, labels=None):
    """Small files of the standard names; returns the training images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    made = {}
    for part, size in [("train", 20), ("t10k", 10)]:
        images = rng.integers(0, 256, (size, side, side), dtype=np.uint8)
        numbers = (np.arange(size) % 10).astype(np.uint8) if labels is None else np.array(labels, dtype=np.uint8)
        made[part] = images, numbers
        for kind, array in [("images-idx3", images), ("labels-idx1", numbers)]:
            data = idx(array)
            name = f"{part}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return made["train"]


def module(root, **changes):
    values = {
        "download": False,
        "channels": 1,
        "resolution": 28,
        "num_classes": 10,
        "batch_size": 4,
        "seed": 0,
    }
    return FashionMnist(root=None if root is None else str(root), **(values | changes))


@pytest.fixture(autouse=True)
def _no_system_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "system")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_reads_plain_and_gzipped_files_in_either_layout(tmp_path, packed, below):
    images, labels = write(tmp_path / below, packed=packed)
    before = sorted(tmp_path.rglob("*"))
    data = module(tmp_path)
    data.check()
    assert torch.equal(data.train_set().images, torch.from_numpy(images).unsqueeze(1))
    assert data.train_set().labels.tolist() == labels.tolist()
    assert len(data.test_set()) == 10
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked beside the files


def test_finds_the_system_package_by_itself(tmp_path):
    write(tmp_path / "system", packed=True)
    data = module(None)
    data.check()
    assert data.fingerprint("train") == module(tmp_path / "system").fingerprint("train")


def test_missing_files_say_both_ways(tmp_path):
    ways = (
        "the Fashion-MNIST files are not there; install Debian's package dataset-fashion-mnist "
        "and leave root=null, or give a folder and download=true"
    )
    with pytest.raises(ValueError, match=f"^root=null: {ways}$"):
        module(None).check()
    with pytest.raises(ValueError, match=f"^root={tmp_path}: {ways}$"):
        module(tmp_path).check()
    write(tmp_path, packed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="the Fashion-MNIST files are not there"):
        module(tmp_path).check()


def test_the_declared_shape_must_be_that_of_the_images(tmp_path):
    write(tmp_path, packed=False)
    for changes, line in [
        ({"channels": 3}, "channels=3: the Fashion-MNIST images have 1"),
        ({"resolution": 32}, "resolution=32: the Fashion-MNIST images are 28x28"),
        ({"num_classes": 3}, r"num_classes=3: the Fashion-MNIST images have 10 \(0 trains without labels\)"),
    ]:
        for download in (False, True):
            with pytest.raises(ValueError, match=f"^{line}$"):
                module(tmp_path, download=download, **changes).check()


def test_files_of_something_else(tmp_path):
    write(tmp_path / "small", packed=False, side=27)
    line = (
        f"root={tmp_path}/small: the train files hold images [20, 27, 27] and labels [20], "
        "not N images of 28x28 with N labels below 10"
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        module(tmp_path / "small").check()
    assert str(caught.value) == line
    write(tmp_path / "few", packed=False, labels=[1, 2])
    with pytest.raises(ValueError, match=r"labels \[2\], not N images"):
        module(tmp_path / "few").check()
    write(tmp_path / "high", packed=False, labels=[10] * 20)
    with pytest.raises(ValueError, match="labels below 10"):
        module(tmp_path / "high").check()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("data", ["", "half", "text"])
def test_broken_files_are_named_in_one_line(tmp_path, packed, data):
    write(tmp_path, packed=packed)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if packed else ""))
    whole = path.read_bytes()
    path.write_bytes({"": b"", "half": whole[: len(whole) // 2], "text": b"<html>not found</html>"}[data])
    with pytest.raises(ValueError, match=rf"^root={tmp_path}: cannot read {path.name} \(.+\)$"):
        module(tmp_path).check()


def test_downloading_needs_a_folder():
    with pytest.raises(ValueError, match=r"^root=null: with download=true, give the folder to download into$"):
        module(None, download=True)


def test_downloads_through_torchvision_when_data_is_wanted(tmp_path, monkeypatch):
    import torchvision

    calls = []

    def download(root, download):
        calls.append((root, download))
        write(tmp_path / "here" / "FashionMNIST" / "raw", packed=False)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    data = module(tmp_path / "here", download=True)
    data.check()
    assert calls == []  # a check creates nothing
    assert not (tmp_path / "here").exists()
    data.prepare_data()
    data.prepare_data()
    assert len(data.train_set()) == 20
    assert calls == [(str(tmp_path / "here"), True)]


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    import torchvision

    def download(root, download):
        raise RuntimeError("Error downloading:\nTried a mirror, got:\nno route\n")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    reason = r"Error downloading: Tried a mirror, got: no route"
    ways = "without a network, install Debian's package dataset-fashion-mnist and set root=null, download=false"
    line = rf"^download=true: torchvision could not download Fashion-MNIST \({reason}\); {ways}$"
    with pytest.raises(ValueError, match=line):
        module(tmp_path, download=True).prepare_data()
