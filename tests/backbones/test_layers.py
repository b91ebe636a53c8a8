from __future__ import annotations

import math

import pytest
import torch

from denoiselab.backbones.layers import LabelEmbedding, group_count, sinusoidal_embedding
from denoiselab.condition import Condition


@pytest.mark.parametrize("shift", [0, 1])
def test_time_embedding_closed_form(shift):
    t = torch.tensor([0.0, 0.25, 17.0, 999.0])
    dim = 12
    got = sinusoidal_embedding(t, dim, order="sin_cos", frequency_shift=shift)
    frequencies = [10000 ** (-i / (dim // 2 - shift)) for i in range(dim // 2)]
    want = [[f(value * w) for f in (math.sin, math.cos) for w in frequencies] for value in t.tolist()]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(got[:3].double(), torch.tensor(want, dtype=torch.float64)[:3], rtol=0, atol=2e-6)
    flipped = sinusoidal_embedding(t, dim, order="cos_sin", frequency_shift=shift)
    assert torch.equal(flipped, got.roll(dim // 2, dims=1))


def test_time_embedding_is_float32_for_any_type_of_t():
    t = torch.tensor([3, 500])
    want = sinusoidal_embedding(t.float(), 8, order="sin_cos", frequency_shift=1)
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        got = sinusoidal_embedding(t.to(dtype), 8, order="sin_cos", frequency_shift=1)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_null_label_is_the_last_row():
    embedding = LabelEmbedding(num_classes=3, dim=4)
    got = embedding(Condition(label=torch.tensor([-1, 0, 2, -1])))
    assert torch.equal(got, embedding.weight[[3, 0, 2, 3]])


@pytest.mark.parametrize("label", [-2, 4])
def test_labels_beyond_the_classes_are_no_rows(label):
    with pytest.raises(IndexError):
        LabelEmbedding(num_classes=3, dim=4)(Condition(label=torch.tensor([label])))


def test_missing_labels_are_an_error():
    with pytest.raises(ValueError, match=r"label=None: must be given to a network of 3 classes"):
        LabelEmbedding(num_classes=3, dim=4)(Condition())


@pytest.mark.parametrize(
    ("channels", "groups"), [(2, 1), (6, 1), (32, 8), (48, 12), (56, 14), (120, 30), (128, 32), (384, 32)]
)
def test_groups(channels, groups):
    assert group_count(channels) == groups
