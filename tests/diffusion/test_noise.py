import math

import pytest
import torch

from denoiselab.diffusion.noise import NoiseSource, bits16, key_of, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer file, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in words) == expected


def source(index, **kwargs):
    return NoiseSource(seed=7, index=torch.as_tensor(index), **kwargs)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7)])
def test_a_sample_does_not_depend_on_its_batch(shape):
    whole = source(range(37), step=3)
    for draw in (lambda s: s.uniform("p", shape), lambda s: s.normal("p", shape)):
        together = draw(whole)
        assert together.shape == (37, *shape)
        alone = torch.cat([draw(source([i], step=3)) for i in range(37)])
        shuffled = draw(source(list(reversed(range(37))), step=3)).flip(0)
        assert torch.equal(together, alone)
        assert torch.equal(together, shuffled)


def test_seed_purpose_step_and_index_each_matter():
    base = source([4], step=2).normal("p", (8,))
    others = [
        NoiseSource(seed=8, index=torch.tensor([4]), step=2).normal("p", (8,)),
        source([4], step=2).normal("q", (8,)),
        source([4], step=3).normal("p", (8,)),
        source([4], step=2 + 2**32).normal("p", (8,)),
        source([5], step=2).normal("p", (8,)),
    ]
    for other in others:
        assert (base - other).abs().min() > 0


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(source([1, 2]).normal("p", (9,))[:, :4], source([1, 2]).normal("p", (4,)))


def test_moments_and_independence():
    z = source(range(2000)).normal("p", (50,), torch.float64)
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    neighbours = torch.stack([(z[1:] * z[:-1]).mean(), (z[:, 1:] * z[:, :-1]).mean()])
    assert neighbours.abs().max() < 4 / math.sqrt(n)
    u = source(range(5000)).uniform("u").sort().values
    assert (u - (torch.arange(5000) + 0.5) / 5000).abs().max() < 1.63 / math.sqrt(5000)  # Kolmogorov, 1 %


def test_16_bit_numbers_are_the_halves_of_the_words():
    index, step = torch.tensor([4, 2**32 - 1]), torch.tensor(2**32 + 3)
    drawn = bits16(13, index, step, key_of(7, "p"))
    assert (drawn.shape, drawn.dtype) == ((2, 13), torch.int16)
    counter = torch.tensor([[0, 1]]), index[:, None], torch.tensor(3), torch.tensor(1)
    words = torch.cat(philox4x32(counter, key_of(7, "p")), dim=1)  # two blocks of each of four words
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten(1)[:, :13]
    assert torch.equal(drawn.long() % 2**16, halves)


def test_16_bit_numbers_are_uniform():
    drawn = bits16(4000, torch.arange(100), torch.tensor(5), key_of(7, "p")).long() + 2**15
    counts = torch.stack([torch.bincount(byte.flatten(), minlength=256) for byte in (drawn >> 8, drawn & 0xFF)])
    chi2 = ((counts - 400_000 / 256) ** 2 / (400_000 / 256)).sum(1)
    assert ((chi2 > 255 - 4 * 22.6) & (chi2 < 255 + 4 * 22.6)).all()  # of 255 degrees of freedom, ±4 deviations


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    source(range(3)).normal("p", (4,))
    assert torch.equal(before, torch.get_rng_state())
