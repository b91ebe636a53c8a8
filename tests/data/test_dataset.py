from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import default_collate

from denoiselab.data.dataset import InMemoryImages, flips
from denoiselab.data.order import Draw

IMAGES = torch.arange(6 * 1 * 2 * 3, dtype=torch.uint8).reshape(6, 1, 2, 3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_an_index_gives_the_image_as_it_is():
    samples = InMemoryImages(IMAGES, LABELS, flip=True, seed=1)
    assert len(samples) == 6
    for index in range(6):
        sample = samples[index]
        assert torch.equal(sample["image"], IMAGES[index])
        assert (sample["label"], sample["index"], sample["step"], sample["place"]) == (
            index % 3,
            index,
            0,
            index,
        )


def test_a_draw_carries_its_step_and_place_and_collates_to_int64():
    samples = InMemoryImages(IMAGES, LABELS)
    batch = default_collate([samples[Draw(4, 7, 0, 0)], samples[Draw(2, 7, 1, 3)]])
    assert torch.equal(batch["image"], IMAGES[[4, 2]])
    assert batch["image"].dtype == torch.uint8
    wanted = {"label": [1, 2], "index": [4, 2], "step": [7, 7], "place": [0, 1]}
    for key, values in wanted.items():
        assert batch[key].dtype == torch.int64
        assert batch[key].tolist() == values


def test_without_labels_every_label_is_null():
    assert [InMemoryImages(IMAGES, None)[i]["label"] for i in range(6)] == [-1] * 6


def test_flips_are_keyed_to_seed_epoch_and_index_alone():
    samples = InMemoryImages(IMAGES, LABELS, flip=True, seed=5)
    for epoch in range(4):
        for index in range(6):
            seen = samples[Draw(index, 9, 0, epoch)]["image"]
            mirrored = flips(5, epoch, index)
            assert torch.equal(seen, IMAGES[index].flip(-1) if mirrored else IMAGES[index])
            assert torch.equal(seen, samples[Draw(index, 2, 5, epoch)]["image"])  # not to step and place


def test_flips_are_fair_and_differ_between_keys():
    coins = torch.tensor([[flips(s, e, i) for i in range(2000)] for s, e in [(0, 0), (0, 1), (1, 0)]]).float()
    assert torch.allclose(coins.mean(1), torch.tensor(0.5), atol=0.05)
    assert torch.allclose(torch.corrcoef(coins), torch.eye(3), atol=0.1)


def test_nothing_is_flipped_unless_asked_for():
    samples = InMemoryImages(IMAGES, LABELS, seed=5)
    assert all(torch.equal(samples[Draw(i, 0, 0, e)]["image"], IMAGES[i]) for i in range(6) for e in range(8))


def test_the_global_generators_are_left_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    samples = InMemoryImages(IMAGES, LABELS, flip=True)
    _ = [samples[Draw(i, 0, i, 0)] for i in range(6)]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_the_digest_is_that_of_the_pixels():
    samples = InMemoryImages(IMAGES, LABELS)
    again = InMemoryImages(IMAGES.clone(), None, flip=True, seed=4)
    assert samples.digest(2) == again.digest(2) != samples.digest(3)
