from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from denoiselab.evaluation.distances import statistics
from denoiselab.evaluation.features import DigitsExtractor
from denoiselab.evaluation.reference import cache_folder, cache_key, reference


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
        torch.equal(a.features, b.features)
        and torch.equal(a.logits, b.logits)
        and torch.equal(a.labels, b.labels)
        and all((x == y).all() for x, y in zip(a.statistics, b.statistics, strict=True))
    )


def test_a_reference_holds_the_features_of_its_split(small):
    for split, held in small.sets.items():
        found = reference(small, split, DigitsExtractor(), batch_size=16)
        features, logits = DigitsExtractor()(held.images)
        torch.testing.assert_close(found.features, features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-4)
        assert torch.equal(found.labels, held.labels)
        assert (found.statistics.mean == statistics(found.features).mean).all()
        assert (found.statistics.covariance == statistics(found.features).covariance).all()


def test_the_second_call_reads_what_the_first_wrote(small, reference_cache):
    extractor = Counting()
    first = reference(small, "train", extractor)
    assert extractor.calls == 1
    assert same(reference(small, "train", extractor), first)
    assert extractor.calls == 1
    key = cache_key(small.fingerprint("train"), extractor.hash, "train")
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
    keys = {cache_key(a, b, s) for a in "pq" for b in "xy" for s in ("train", "test")}
    assert len(keys) == 8


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
    assert len(found.features) == 70
    assert "not kept" in caplog.text


def test_cache_folder(monkeypatch, reference_cache):
    assert cache_folder() == reference_cache
    monkeypatch.delenv("DENOISELAB_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "denoiselab"
