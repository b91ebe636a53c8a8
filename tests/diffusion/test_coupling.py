from itertools import permutations

import pytest
import torch

from denoiselab.diffusion.coupling import Independent, MinibatchOT
from denoiselab.diffusion.noise import NoiseSource


def noise_of(index, total=None):
    return NoiseSource(seed=5, index=torch.as_tensor(index), step=7, total=total)


def cost(x0, eps):
    return (x0 - eps).double().square().sum()


def test_no_other_permutation_is_cheaper():
    x0, noise = torch.randn(8, 3, 2, 2), noise_of(range(8))
    independent, coupled = Independent()(x0, noise), MinibatchOT(group_size=4)(x0, noise)
    for rows in (slice(0, 4), slice(4, 8)):
        best = min(cost(x0[rows], independent[rows][list(order)]) for order in permutations(range(4)))
        assert cost(x0[rows], coupled[rows]) == best
    assert cost(x0, coupled) < cost(x0, independent)


def test_the_marginal_of_the_noise_is_kept():
    x0, noise = torch.randn(32, 1, 2, 2), noise_of(range(32))
    independent, coupled = Independent()(x0, noise), MinibatchOT(group_size=16)(x0, noise)
    for rows in (slice(0, 16), slice(16, 32)):
        assert {tuple(e.flatten().tolist()) for e in coupled[rows]} == {
            tuple(e.flatten().tolist()) for e in independent[rows]
        }


def test_in_one_dimension_both_are_sorted():
    x0, noise = torch.randn(64, 1, 1, 1, dtype=torch.float64), noise_of(range(64))
    coupled = MinibatchOT(group_size=64)(x0, noise)
    torch.testing.assert_close(
        coupled.flatten()[x0.flatten().argsort()], Independent()(x0, noise).flatten().sort().values
    )


def test_the_plan_does_not_depend_on_the_micro_batch():
    x0, coupling = torch.randn(32, 3, 4, 4), MinibatchOT(group_size=8)
    whole = coupling(x0, noise_of(range(32), total=32))
    for size in (8, 16):
        parts = [coupling(x0[i : i + size], noise_of(range(i, i + size), total=32)) for i in range(0, 32, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_group_of_one_is_independent():
    x0, noise = torch.randn(4, 1, 2, 2), noise_of(range(4))
    assert torch.equal(MinibatchOT(group_size=1)(x0, noise), Independent()(x0, noise))


def test_whole_groups_are_needed():
    with pytest.raises(ValueError, match=r"^group_size=0: must be at least 1"):
        MinibatchOT(group_size=0)
    coupling = MinibatchOT(group_size=4)
    for index in ([0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 2, 4, 6]):
        with pytest.raises(ValueError, match=r"^group_size=4: "):
            coupling(torch.zeros(len(index), 1, 1, 1), noise_of(index))
    with pytest.raises(ValueError, match=r"^group_size=4: must divide the micro-batch of 6 samples"):
        coupling.check(6)
    coupling.check(8)
    Independent().check(7)
