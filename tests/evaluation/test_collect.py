from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from denoiselab.evaluation.arrays import read_tensors, write_tensors
from denoiselab.evaluation.collect import Clock, collect, gather
from denoiselab.evaluation.features import Extractor, Features
from denoiselab.runs.launch import launch


class Sums(nn.Module):
    """Three integer features, so that the sharding can leave no trace at all."""

    def forward(self, images):
        x = images.double().flatten(1)
        return Features(torch.stack((x.sum(1), x[:, 0], x[:, -1]), 1), logits=x[:, :2])


class SumExtractor(Extractor):
    name = label = resize = "sums"
    num_classes = None
    calls = 0

    def check(self, *, channels, resolution):
        pass

    def _build(self):
        return Sums()

    def __call__(self, images, batch_size=250):
        self.calls += len(images)
        return super().__call__(images, batch_size)


def image(number):
    return (torch.arange(4).reshape(1, 2, 2) * 3 + number * 7).remainder(256).to(torch.uint8)


def source(batch_size, asked=None, until=None):
    """Images that are functions of their numbers; breaks down after `until` of them."""

    def draw(numbers):
        for start in range(0, len(numbers), batch_size):
            part = list(numbers[start : start + batch_size])
            if asked is not None:
                asked.extend(part)
            if until is not None and start >= until:
                raise RuntimeError("killed")
            yield torch.tensor(part), torch.stack([image(n) for n in part])

    return draw


def expected(count):
    return SumExtractor()(torch.stack([image(n) for n in range(count)]))


def equal(found, wanted):
    return torch.equal(found.features, wanted.features) and torch.equal(found.logits, wanted.logits)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_come_back_by_number(batch_size):
    done = []
    found = collect(source(batch_size), {"a": SumExtractor()}, 23, batch_size=4, advance=done.append)
    assert list(found) == ["a"]
    assert equal(found["a"], expected(23))
    assert sum(done) == 23


def test_one_pass_feeds_every_extractor():
    asked = []
    found = collect(source(5, asked), {"a": SumExtractor(), "b": SumExtractor()}, 12, batch_size=4)
    assert asked == list(range(12))
    assert equal(found["a"], expected(12))
    assert equal(found["b"], expected(12))


def test_an_interrupted_collection_goes_on_from_finished_parts(tmp_path):
    extractor, done = {"a": SumExtractor()}, []
    with pytest.raises(RuntimeError, match="killed"):
        collect(source(300, until=1200), extractor, 2000, batch_size=400, shards=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # of 600 images each
    asked: list[int] = []
    found = collect(source(300, asked), extractor, 2000, batch_size=400, shards=tmp_path, advance=done.append)
    assert asked == list(range(1200, 2000))
    assert sum(done) == 2000
    assert equal(found["a"], expected(2000))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_part_is_drawn_again(tmp_path, damage, caplog):
    collect(source(300), {"a": SumExtractor()}, 1200, batch_size=400, shards=tmp_path)
    first = min(tmp_path.iterdir())
    content = first.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    first.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": flipped}[damage])
    asked: list[int] = []
    with caplog.at_level(logging.WARNING):
        found = collect(source(300, asked), {"a": SumExtractor()}, 1200, batch_size=400, shards=tmp_path)
    assert asked == list(range(600))
    assert "drawn again" in caplog.text
    assert equal(found["a"], expected(1200))


def test_parts_of_other_extractors_do_not_count(tmp_path):
    collect(source(500), {"a": SumExtractor()}, 500, batch_size=500, shards=tmp_path)
    asked: list[int] = []
    collect(source(500, asked), {"b": SumExtractor()}, 500, batch_size=500, shards=tmp_path)
    assert len(asked) == 500


def test_the_clock_knows_what_took_the_time():
    clock = Clock()
    collect(source(5), {"a": SumExtractor()}, 10, batch_size=5, clock=clock)
    assert set(clock.seconds) == {"network", "features"}
    assert all(seconds > 0 for seconds in clock.seconds.values())


COUNTS = [8, 7, 1]


def collect_on_a_rank(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for count in COUNTS:
        found = collect(source(3), {"a": SumExtractor()}, count, batch_size=2)
        assert bool(found) == (dist.get_rank() == 0)
        if found:
            np.savez(Path(folder) / f"{count}.npz", features=found["a"].features, logits=found["a"].logits)
    parts = gather({"x": torch.arange(dist.get_rank())} if dist.get_rank() else {})  # nothing on rank 0
    assert [part["x"].tolist() for part in parts] == ([[0]] if dist.get_rank() == 0 else [])
    parts = Path(folder) / "parts"
    collect(source(250), {"a": SumExtractor()}, 1600, batch_size=400, shards=parts)
    dist.barrier()
    if dist.get_rank() == 0:
        max(parts.iterdir()).unlink()
    dist.barrier()
    asked: list[int] = []
    found = collect(source(250, asked), {"a": SumExtractor()}, 1600, batch_size=400, shards=parts)
    (Path(folder) / f"asked_{dist.get_rank()}").write_text(str(len(asked)))
    assert not found or equal(found["a"], expected(1600))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_finds(tmp_path):
    launch(collect_on_a_rank, (str(tmp_path),), 2)
    for count in COUNTS:
        with np.load(tmp_path / f"{count}.npz") as held:
            assert (held["features"] == expected(count).features.numpy()).all()
            assert (held["logits"] == expected(count).logits.numpy()).all()
    asked = [int((tmp_path / f"asked_{rank}").read_text()) for rank in (0, 1)]
    assert 0 < sum(asked) < 1600
    assert abs(asked[0] - asked[1]) <= 1  # what was missing is shared out anew


def test_tensors_on_disk(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.zeros(0)}
    write_tensors(tmp_path / "new" / "x.safetensors", tensors)
    read = read_tensors(tmp_path / "new" / "x.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_tensors(tmp_path / "file" / "x.safetensors", tensors)
