from __future__ import annotations

import hashlib
import logging
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import denoiselab.evaluation.reference as module
from denoiselab.evaluation.distances import statistics
from denoiselab.evaluation.extractors import DigitsExtractor
from denoiselab.evaluation.reference import cache_folder, cache_key, published, reference
from denoiselab.runs.launch import launch


class Counting(DigitsExtractor):
    calls = 0

    def __call__(self, images, batch_size=250):
        self.calls += 1
        return super().__call__(images, batch_size)


@pytest.fixture
def small(digits, make_data):
    train, test = digits.train_set(), digits.test_set()
    return make_data((train.images[:70], train.labels[:70]), (test.images[:30], test.labels[:30]))


def same(a, b):
    return (
        torch.equal(a.sample.features, b.sample.features)
        and torch.equal(a.sample.logits, b.sample.logits)
        and torch.equal(a.sample.labels, b.sample.labels)
        and torch.equal(a.numbers, b.numbers)
        and a.facts == b.facts
        and all((x == y).all() for x, y in zip(a.moments, b.moments, strict=True))
    )


def test_a_reference_holds_the_features_of_its_split(small):
    for split, held in small.sets.items():
        found = reference(small, split, DigitsExtractor(), batch_size=16)
        whole = DigitsExtractor()(held.images)
        torch.testing.assert_close(found.sample.features, whole.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.sample.logits, whole.logits, rtol=1e-5, atol=1e-4)
        assert torch.equal(found.sample.labels, held.labels)
        assert found.sample.classes == 10
        assert found.numbers.tolist() == list(range(len(held)))
        assert found.facts == {
            "reference": split,
            "reference_hash": small.fingerprint(split),
            "reference_count": len(held),
        }
        for mine, theirs in zip(found.moments, statistics(found.sample.features), strict=True):
            assert np.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_of_many_images_some_are_kept_and_all_are_counted(small, monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 30)
    found = reference(small, "train", DigitsExtractor(), batch_size=16)
    assert found.numbers.tolist() == list(range(0, 70, 3))
    assert len(found.sample) == 24
    assert torch.equal(found.sample.labels, small.train_set().labels[::3])
    every = DigitsExtractor()(small.train_set().images, 16).features  # batches of another size round differently
    assert np.allclose(found.moments.covariance, statistics(every).covariance, rtol=1e-6, atol=1e-9)
    assert found.facts["reference_count"] == 70


def reference_on_a_rank(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = pickle.loads((Path(folder) / "data").read_bytes())
    found = reference(data, "train", DigitsExtractor(), cache=Path(folder) / "cache", batch_size=16)
    assert (found is None) == (dist.get_rank() != 0)
    if found is not None:
        (Path(folder) / "found").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_make_the_reference_of_one(small, tmp_path):
    tensors = {split: (held.images, held.labels) for split, held in small.sets.items()}
    (tmp_path / "data").write_bytes(pickle.dumps(Held(**tensors)))
    launch(reference_on_a_rank, (str(tmp_path),), 2)
    both, alone = pickle.loads((tmp_path / "found").read_bytes()), reference(small, "train", DigitsExtractor())
    assert torch.equal(both.numbers, alone.numbers)
    assert torch.equal(both.sample.labels, alone.sample.labels)
    torch.testing.assert_close(both.sample.features, alone.sample.features, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(both.moments, statistics(both.sample.features), strict=True):  # of the same features
        assert np.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


class Held:
    """Data that another process can unpickle."""

    num_classes = 10

    def __init__(self, train, test):
        self.train, self.test = train, test

    def train_set(self):
        return self

    def fingerprint(self, split):
        return "same"

    def __len__(self):
        return len(self.train[1])

    def image(self, index):
        return self.train[0][index]

    def label(self, index):
        return int(self.train[1][index])


def gaussian_file(path, **more):
    mean, covariance = np.zeros(64), np.eye(64)
    np.savez(path, **{"mu": mean, "sigma": covariance} | more)
    return path


def test_published_statistics(tmp_path):
    path = gaussian_file(tmp_path / "edm.npz")  # EDM's and pytorch-fid's arrays
    found = published(path)
    assert found.moments.mean.shape == (64,)
    assert found.moments.covariance.dtype == np.float64
    assert found.spatial is None
    assert found.sample is None
    assert (found.facts["reference"], found.facts["reference_file"]) == ("published", "edm.npz")
    assert found.facts["reference_hash"] == hashlib.sha256(path.read_bytes()).hexdigest()
    adm = gaussian_file(
        tmp_path / "adm.npz", mu_s=np.ones(7), sigma_s=np.eye(7), arr_0=np.zeros((2, 4, 4, 3), np.uint8)
    )
    assert published(adm).spatial.mean.tolist() == [1.0] * 7


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "must hold the arrays mu and sigma, not mu"),
        ({"x": np.zeros(3)}, "must hold the arrays mu and sigma, not none of them"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma has shape \(4, 4\), mu \(3,\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu and sigma must be finite"),
        ({"mu": np.array([None] * 3), "sigma": np.eye(3)}, "must be an npz"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz: {message}"):
        published(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="none.npz: no such file"):
        published(tmp_path / "none.npz")


def test_files_of_any_kind_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")  # to open it would wait for ever
    (tmp_path / "text.npz").write_bytes(b"text")
    (tmp_path / "half.npz").write_bytes(gaussian_file(tmp_path / "whole.npz").read_bytes()[:500])
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(3), sigma=np.zeros((3500, 3500)))
    for name, reason in [
        ("pipe", "no such file"),
        *((name, "must be an npz with the arrays mu and sigma") for name in ("text", "half", "bomb")),
    ]:
        with pytest.raises(
            ValueError, match=f"^{tmp_path}/{name}.npz: {reason}; ADM's, EDM's and pytorch-fid's [a-z ]+$"
        ):
            published(tmp_path / f"{name}.npz")


def test_the_second_call_reads_what_the_first_wrote(small, reference_cache):
    extractor = Counting()
    first = reference(small, "train", extractor)
    assert extractor.calls == 1
    assert same(reference(small, "train", extractor), first)
    assert extractor.calls == 1
    key = cache_key(small.fingerprint("train"), extractor, "train")
    assert [p.name for p in reference_cache.iterdir()] == [f"{key}.safetensors"]  # and nothing beside it


def test_other_data_split_or_extractor_is_another_key(small, make_data, tmp_path):
    changed = small.train_set().images.clone()
    changed[0, 0, 0, 0] ^= 1
    other = make_data((changed, small.train_set().labels), (small.test_set().images, small.test_set().labels))
    extractor = Counting()
    reference(small, "train", extractor, cache=tmp_path)
    reference(other, "train", extractor, cache=tmp_path)
    reference(small, "test", extractor, cache=tmp_path)
    assert extractor.calls == 3
    extractors = [SimpleNamespace(hash=h, spatial=s) for h in "xy" for s in (False, True)]
    keys = {cache_key(a, b, s) for a in "pq" for b in extractors for s in ("train", "test")}
    assert len(keys) == 16


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign"])
def test_a_damaged_file_is_computed_again_with_a_warning(small, reference_cache, caplog, damage):
    extractor = Counting()
    first = reference(small, "train", extractor)
    (path,) = reference_cache.iterdir()
    content = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING):
        assert same(reference(small, "train", extractor), first)
    assert extractor.calls == 2
    assert "damaged" in caplog.text
    reference(small, "train", extractor)
    assert extractor.calls == 2  # the file is whole again


def test_a_folder_that_cannot_be_written_costs_a_warning_only(small, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = reference(small, "train", DigitsExtractor(), cache=tmp_path / "file" / "cache")
    assert len(found.sample) == 70
    assert "not kept" in caplog.text


def test_cache_folder(monkeypatch, reference_cache):
    assert cache_folder() == reference_cache
    monkeypatch.delenv("DENOISELAB_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "denoiselab"
