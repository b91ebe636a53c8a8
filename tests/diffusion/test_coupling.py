from itertools import permutations

import pytest
import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.coupling import Independent, MinibatchOT
from denoiselab.diffusion.noise import NoiseSource

NONE = Condition()


def noise_of(index, total=None):
    return NoiseSource(seed=5, index=torch.as_tensor(index), step=7, total=total)


def cost(x0, eps):
    return (x0 - eps).double().square().sum()


def test_no_other_permutation_is_cheaper():
    x0, noise = torch.randn(8, 3, 2, 2), noise_of(range(8))
    independent, coupled = Independent()(x0, noise, NONE), MinibatchOT(group_size=4)(x0, noise, NONE)
    for rows in (slice(0, 4), slice(4, 8)):
        best = min(cost(x0[rows], independent[rows][list(order)]) for order in permutations(range(4)))
        assert cost(x0[rows], coupled[rows]) == best
    assert cost(x0, coupled) < cost(x0, independent)


def test_the_marginal_of_the_noise_is_kept():
    x0, noise = torch.randn(32, 1, 2, 2), noise_of(range(32))
    independent, coupled = Independent()(x0, noise, NONE), MinibatchOT(group_size=16)(x0, noise, NONE)
    for rows in (slice(0, 16), slice(16, 32)):
        assert {tuple(e.flatten().tolist()) for e in coupled[rows]} == {
            tuple(e.flatten().tolist()) for e in independent[rows]
        }


def test_in_one_dimension_both_are_sorted():
    x0, noise = torch.randn(64, 1, 1, 1, dtype=torch.float64), noise_of(range(64))
    coupled = MinibatchOT(group_size=64)(x0, noise, NONE)
    torch.testing.assert_close(
        coupled.flatten()[x0.flatten().argsort()], Independent()(x0, noise, NONE).flatten().sort().values
    )


def test_the_plan_does_not_depend_on_the_micro_batch():
    x0, coupling = torch.randn(32, 3, 4, 4), MinibatchOT(group_size=8)
    whole = coupling(x0, noise_of(range(32), total=32), NONE)
    for size in (8, 16):
        parts = [coupling(x0[i : i + size], noise_of(range(i, i + size), total=32), NONE) for i in range(0, 32, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_labelled_images_trade_noise_within_their_class():
    """Across classes the noise would tell the class: here a class lies wholly on one side of the other."""
    label = torch.arange(256) % 2
    x0, noise = 2.0 * label.float().reshape(-1, 1, 1, 1) - 1, noise_of(range(256))
    independent, blind = Independent()(x0, noise, NONE), MinibatchOT(group_size=256)(x0, noise, NONE)
    coupled = MinibatchOT(group_size=256)(x0, noise, Condition(label=label))
    for kind in (0, 1):
        assert torch.equal(coupled[label == kind].sort(0).values, independent[label == kind].sort(0).values)
        assert blind[label == kind].mean().abs() > 0.5
    images = torch.randn(256, 1, 2, 2)
    best = MinibatchOT(group_size=256)(images, noise, Condition(label=label))
    for rows in (label == 0, label == 1):
        assert cost(images[rows], best[rows]) < cost(images[rows], Independent()(images, noise, NONE)[rows])


def test_a_group_of_one_is_independent():
    x0, noise = torch.randn(4, 1, 2, 2), noise_of(range(4))
    assert torch.equal(MinibatchOT(group_size=1)(x0, noise, NONE), Independent()(x0, noise, NONE))


def test_whole_groups_are_needed():
    with pytest.raises(ValueError, match=r"^group_size=0: must be at least 1"):
        MinibatchOT(group_size=0)
    coupling = MinibatchOT(group_size=4)
    for index in ([0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 2, 4, 6]):
        with pytest.raises(ValueError, match=r"^group_size=4: "):
            coupling(torch.zeros(len(index), 1, 1, 1), noise_of(index), NONE)
    with pytest.raises(ValueError, match=r"^group_size=4: must divide the micro-batch of 6 samples"):
        coupling.check(6)
    coupling.check(8)
    Independent().check(7)
