from __future__ import annotations

from itertools import islice

import pytest

from denoiselab.data.order import Draw, GlobalBatchSampler, micro_batch_size, permutation

SIZE, BATCH = 30, 24
GOLDEN = [0, 6, 2, 1, 3, 7, 4, 5]


def draws(steps=5, *, rank=0, world_size=1, accumulate=1, start_step=0, seed=3, size=SIZE, batch_size=BATCH):
    sampler = GlobalBatchSampler(
        size=size,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        start_step=start_step,
    )
    return list(islice(sampler, steps * accumulate))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 3), (8, 1), (1, 24)])
def test_every_shape_draws_the_same_global_batches(world_size, accumulate):
    whole = [draw for batch in draws() for draw in batch]
    parts = [draws(rank=r, world_size=world_size, accumulate=accumulate) for r in range(world_size)]
    for micro_batches in parts:
        assert {len(b) for b in micro_batches} == {BATCH // (world_size * accumulate)}
        for i, batch in enumerate(micro_batches):
            assert {draw.step for draw in batch} == {i // accumulate}
    together = sorted((d for p in parts for b in p for d in b), key=lambda d: (d.step, d.place))
    assert together == whole


def test_micro_batches_of_the_ranks_lie_side_by_side():
    batches = draws(1, rank=1, world_size=2, accumulate=2)
    assert [[draw.place for draw in batch] for batch in batches] == [list(range(6, 12)), list(range(18, 24))]


def test_starting_later_equals_skipping():
    assert draws(3, start_step=4) == draws(7)[4:]
    shape = {"rank": 1, "world_size": 2, "accumulate": 3}
    assert draws(2, start_step=5, **shape) == draws(7, **shape)[15:]


def test_every_epoch_visits_each_sample_once_though_batches_straddle():
    stream = [draw for batch in draws(10) for draw in batch]  # 240 draws are 8 epochs
    for epoch in range(8):
        assert sorted(d.index for d in stream if d.epoch == epoch) == list(range(SIZE))
    assert {d.epoch for d in stream if d.step == 1} == {0, 1}
    orders = {tuple(d.index for d in stream if d.epoch == epoch) for epoch in range(8)}
    assert len(orders) == 8


def test_a_batch_larger_than_the_data_set():
    (batch,) = draws(1, size=5, batch_size=12)
    assert [d.epoch for d in batch] == [0] * 5 + [1] * 5 + [2] * 2
    assert sorted(d.index for d in batch[5:10]) == list(range(5))


def test_the_seed_decides_and_iterating_again_repeats():
    assert draws(seed=3) == draws(seed=3)
    assert draws(seed=3) != draws(seed=4)
    sampler = GlobalBatchSampler(size=SIZE, batch_size=BATCH, seed=0, rank=0, world_size=1, accumulate=1, start_step=0)
    assert list(islice(sampler, 3)) == list(islice(sampler, 3))


def test_there_is_no_length():
    sampler = GlobalBatchSampler(size=SIZE, batch_size=BATCH, seed=0, rank=0, world_size=1, accumulate=1, start_step=0)
    with pytest.raises(TypeError):
        len(sampler)


def test_the_order_is_the_same_in_every_version():
    # computed once with NumPy 2.4 from PCG64's raw output, which NumPy promises not to change
    assert permutation(8, 3, 1).tolist() == GOLDEN
    assert draws(1, size=8, batch_size=1, seed=3, start_step=8) == [[Draw(GOLDEN[0], 8, 0, 1)]]


def test_what_does_not_divide_is_an_error():
    expected = r"^batch_size=10: must be divisible by 2 ranks x 2 accumulated micro-batches$"
    with pytest.raises(ValueError, match=expected):
        micro_batch_size(10, 2, 2)
    with pytest.raises(ValueError, match=expected):
        draws(batch_size=10, world_size=2, accumulate=2)
    assert micro_batch_size(12, 2, 2) == 3
