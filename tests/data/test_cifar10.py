from __future__ import annotations

import json
import pickle
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from denoiselab.data import cifar10
from denoiselab.data.cifar10 import FOLDER, PAGE, Cifar10
from stand_ins import python2_pickle, random_images, write_cifar10, write_edm_zip

WAYS = f"unpack cifar-10-python.tar.gz of {PAGE} there, or set download=true; or give EDM's cifar10-32x32.zip as root"


def module(root, **changes):
    values = {
        "test_root": None,
        "download": False,
        "channels": 3,
        "resolution": 32,
        "num_classes": 10,
        "batch_size": 4,
        "seed": 0,
    }
    return Cifar10(root=None if root is None else str(root), **(values | changes))


def refuses(line, root, **changes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        module(root, **changes).check()
    assert str(caught.value) == line


def zipped(tmp_path, count=50, labels=True):
    return write_edm_zip(tmp_path / "cifar10-32x32.zip", random_images(count, 32), [3] * count if labels else None)


@pytest.mark.parametrize("below", [".", FOLDER])
def test_reads_the_python_batches(cifar10_folder, below):
    images, labels = write_cifar10(cifar10_folder / FOLDER, per_batch=10)
    data = module(cifar10_folder / below)
    data.check()
    assert torch.equal(data.train_set().images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert data.train_set().labels.tolist() == labels
    assert data.train_set()[3]["image"].is_contiguous()
    assert len(data.test_set()) == 10


def test_the_zip_of_edm_is_the_same_data(cifar10_folder, tmp_path):
    images, labels = write_cifar10(cifar10_folder / FOLDER, per_batch=10)
    path = write_edm_zip(tmp_path / "cifar10-32x32.zip", images, labels)
    data = module(path, test_root=str(cifar10_folder))
    data.check()
    for split in ("train", "test"):
        assert data.fingerprint(split) == module(cifar10_folder).fingerprint(split)
    test = write_edm_zip(tmp_path / "test.zip", images[:10], labels[:10])
    assert len(module(path, test_root=str(test)).test_set()) == 10
    for label in (module(path, num_classes=0).train_set().label(i) for i in range(50)):
        assert label == -1


def test_a_zip_without_labels_trains_without(cifar10_folder, tmp_path):
    path = zipped(tmp_path, labels=False)
    assert len(module(path, num_classes=0).train_set()) == 50
    line = f"root={path}: cannot read cifar10-32x32.zip (it has no labels; num_classes=0 trains without)"
    refuses(line, path, test_root=str(cifar10_folder))


def test_missing_files_say_what_to_fetch_and_where_to_put_it(tmp_path):
    refuses(f"root=null: give the folder that holds {FOLDER}: {WAYS}", None)
    refuses(f"root={tmp_path}: holds no {FOLDER}: {WAYS}", tmp_path)


@pytest.mark.usefixtures("cifar10_folder")
def test_a_zip_has_no_test_images(tmp_path):
    path = zipped(tmp_path)
    line = f"test_root=null: root={path} holds the training images only; give the folder that holds {FOLDER}"
    refuses(line, path)


def test_the_declared_shape_must_be_that_of_the_images(cifar10_folder):
    refuses("channels=1: the CIFAR-10 images have 3", cifar10_folder, channels=1)
    refuses("resolution=64: the CIFAR-10 images are 32x32", cifar10_folder, resolution=64)
    refuses("num_classes=100: the CIFAR-10 images have 10 (0 trains without labels)", cifar10_folder, num_classes=100)
    refuses("channels=1: the CIFAR-10 images have 3", cifar10_folder / "empty", channels=1, download=True)


def test_counts_are_checked(cifar10_folder, tmp_path, monkeypatch):
    path = zipped(tmp_path, count=49)
    refuses(f"root={path}: holds 49 train images, not 50", path)
    monkeypatch.undo()
    refuses(f"root={cifar10_folder}: holds 50 train images, not 50,000", cifar10_folder)


EXPLODED = []


def explode():
    EXPLODED.append(1)


class Bomb:
    def __reduce__(self):
        return explode, ()


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_batch_is_run(cifar10_folder, protocol):
    path = cifar10_folder / FOLDER / "data_batch_2"
    batch = {b"data": np.zeros((10, 3072), np.uint8), b"labels": [0] * 10, b"more": Bomb()}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    with pytest.raises(ValueError, match=rf"^root={cifar10_folder}: cannot read data_batch_2 \(it asks for .+\)$"):
        module(cifar10_folder).check()
    assert not EXPLODED
    pickle.loads(path.read_bytes())  # a trusting unpickler
    assert EXPLODED.pop()


def test_batches_of_something_else(cifar10_folder):
    path = cifar10_folder / FOLDER / "test_batch"
    pixels = np.zeros((10, 3072), np.uint8)
    shapes = "holds images [10, 3, 32, 32] and labels [{}], not N images of 3x32x32 with N labels below 10"
    for batch, reason in [
        ({b"data": pixels, b"labels": [0] * 9}, "test_batch " + shapes.format(9)),
        ({b"data": pixels, b"labels": [10] * 10}, "test_batch " + shapes.format(10)),
        ({b"data": pixels, b"labels": [-1] * 10}, "test_batch " + shapes.format(10)),
        ({b"data": pixels, b"fine_labels": [0] * 10}, "cannot read test_batch (b'labels')"),
        ({b"data": pixels.astype(float), b"labels": [0] * 10}, "it holds an array of f8, not of uint8 or integers"),
        ({b"data": pixels[:, :3000], b"labels": [0] * 10}, "cannot read test_batch (cannot reshape"),
        ({b"data": pixels, b"labels": [0.0] * 10}, "cannot read test_batch (it holds something else than lists"),
        ({b"data": pixels, b"labels": [10**30] * 10}, "its pixels are uint8 and its labels object, not"),
        ([1, 2], "cannot read test_batch (list indices"),
    ]:
        path.write_bytes(pickle.dumps(batch, protocol=3))
        with pytest.raises(ValueError, match=f"^root={cifar10_folder}: ") as caught:
            module(cifar10_folder).check()
        assert reason in str(caught.value)


def array_of(kind, state, data=bytes(32)):
    """The pickle of an array whose type is put together by hand: 4 numbers of 8 bytes."""
    text = b"X" + struct.pack("<I", len(kind)) + kind
    dtype = b"cnumpy\ndtype\n(" + text + b"\x89\x88tR" + state
    empty = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\x01btR"
    return empty + b"(K\x01(K\x04t" + dtype + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb"


PLAIN = (
    b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"  # the state of a type: its flags, the last, are 0
)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (array_of(b"O8", PLAIN, b"A" * 32), "it holds an array of O8, not of uint8 or integers"),  # pointers
        (array_of(b"V8", PLAIN), "it holds an array of V8, not of uint8 or integers"),
        (array_of(b"i8", PLAIN), "its pixels are int64 and its labels int64, not uint8 and integers"),
        (array_of(b"i8", PLAIN, bytes(31)), "buffer size must be a multiple of element size"),
        (array_of(b"u1", PLAIN, bytes(31)), "cannot reshape array of size 31 into shape (4,)"),
        (b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR", "its pixels are float64 and its labels int64, not"),
        (b"cnumpy._core.multiarray\n_reconstruct\n}b", "_Array.__setstate__() missing 1 required positional argument"),
        (b"\x96" + struct.pack("<Q", 2**34), "150"),  # a bytearray, made before it is read
    ],
)
def test_an_array_is_made_of_its_bytes_whatever_a_pickle_says(cifar10_folder, pickled, reason):
    path = cifar10_folder / FOLDER / "test_batch"
    path.write_bytes(b"\x80\x03}(C\x04data" + pickled + b"C\x06labels](K\x01eu.")
    with pytest.raises(ValueError, match=f"^root={cifar10_folder}: cannot read test_batch ") as caught:
        module(cifar10_folder).check()
    assert reason in str(caught.value)


def test_a_short_pickle_takes_little_memory(tmp_path):
    laughs = 0
    for _ in range(6):
        laughs = [laughs] * 10
    memo = b"\x80\x02}(C\x04dataK\0r" + struct.pack("<I", 2**24) + b"u."
    for pickled in (memo, pickle.dumps({b"data": laughs, b"labels": laughs})):
        (tmp_path / "batch").write_bytes(pickled)
        tracemalloc.start()
        with pytest.raises(ValueError, match="it holds something else than lists of whole numbers and arrays"):
            cifar10.read_batch(tmp_path / "batch")
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()


def test_damaged_files_are_named_in_one_line(cifar10_folder, tmp_path):
    batch, packed = cifar10_folder / FOLDER / "data_batch_5", zipped(tmp_path)
    rng = np.random.default_rng(0)
    for path, root in [(batch, cifar10_folder), (packed, packed)]:
        whole = path.read_bytes()
        cuts = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
        for damaged in [b"<html>not found</html>", *cuts, rng.bytes(3000)]:
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"^root={root}: cannot read {path.name} \([^\n]+\)$"):
                module(root).check()


def test_a_flipped_byte_is_never_more_than_one_line(cifar10_folder):
    path = cifar10_folder / FOLDER / "data_batch_1"
    whole = path.read_bytes()
    rng, lines = np.random.default_rng(1), []
    for place in [*range(60), *rng.integers(0, len(whole), 60)]:
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            module(cifar10_folder).check()
        except ValueError as error:
            lines.append(str(error))
    assert all(re.fullmatch(rf"root={cifar10_folder}: [^\n]+", line) for line in lines)
    assert len(lines) > 30


def test_zips_of_something_else(cifar10_folder, tmp_path):
    images, path = random_images(50, 32), tmp_path / "a.zip"
    test = str(cifar10_folder)
    shape = "not N images of 3x32x32 with N labels below 10"
    write_edm_zip(path, random_images(50, 28), [0] * 50)
    refuses(
        f"root={path}: cannot read a.zip (00000/img00000000.png is RGB of 28x28, not RGB of 32x32)",
        path,
        test_root=test,
    )
    for labels in ([0.5] * 50, [12] * 50, [True] * 50):
        write_edm_zip(path, images, labels)
        refuses(f"root={path}: a.zip holds images [50, 3, 32, 32] and labels [50], {shape}", path, test_root=test)
    write_edm_zip(path, images, [[0.0, 1.0]] * 50)
    refuses(f"root={path}: a.zip holds images [50, 3, 32, 32] and labels [50, 2], {shape}", path, test_root=test)
    write_edm_zip(path, images[..., 0], [0] * 50)
    refuses(
        f"root={path}: cannot read a.zip (00000/img00000000.png is L of 32x32, not RGB of 32x32)", path, test_root=test
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": []}))
    refuses(f"root={path}: cannot read a.zip (it holds no PNG files)", path, test_root=test)


def test_a_python_2_pickle_is_what_the_fixture_writes(cifar10_folder):
    data = (cifar10_folder / FOLDER / "data_batch_1").read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in data
    assert pickle.loads(python2_pickle({b"a": [1]}), encoding="latin1") == {"a": [1]}  # text, to Python 3


def test_downloading_needs_a_folder():
    for root in (None, "a.zip"):
        with pytest.raises(ValueError, match=r"^root=.+: with download=true, give the folder to download into$"):
            module(root, download=True)


def test_downloads_through_torchvision_when_data_is_wanted(tmp_path, monkeypatch):
    calls = []

    def download(url, root, filename, md5):
        calls.append((root, filename, len(md5)))
        write_cifar10(tmp_path / "here" / FOLDER, per_batch=10)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    monkeypatch.setattr(cifar10, "COUNTS", {"train": 50, "test": 10})
    data = module(tmp_path / "here", download=True)
    data.check()
    assert calls == []  # a check creates nothing
    data.prepare_data()
    data.prepare_data()
    assert len(data.train_set()) == 50
    assert calls == [(str(tmp_path / "here"), "cifar-10-python.tar.gz", 32)]


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    ways = f"without a network, unpack cifar-10-python.tar.gz of {PAGE} into root={tmp_path} and set download=false"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        module(tmp_path, download=True).prepare_data()
    assert str(caught.value) == f"download=true: torchvision could not download CIFAR-10 (no route to host); {ways}"
