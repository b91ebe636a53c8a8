from __future__ import annotations

import pytest
import torch

from denoiselab.codecs.rgb import RGB

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_every_grey_level_comes_back():
    codec = RGB()
    encoded = codec.encode(LEVELS)
    assert encoded.dtype == torch.float32
    assert (float(encoded.min()), float(encoded.max())) == (-1.0, 1.0)
    decoded = codec.decode(encoded)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, LEVELS)


def test_levels_are_equally_far_apart():
    steps = RGB().encode(LEVELS).flatten().double().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 2 / 255), rtol=1e-4, atol=0)


@pytest.mark.parametrize("inside", [-0.49, 0.49])
def test_values_between_go_to_the_nearest_level(inside):
    between = RGB().encode(LEVELS) + inside / 127.5
    assert torch.equal(RGB().decode(between), LEVELS)


def test_values_outside_are_clipped():
    values = torch.tensor([-100.0, -1.01, 1.01, 100.0, torch.inf, -torch.inf]).reshape(1, 1, 2, 3)
    assert RGB().decode(values).flatten().tolist() == [0, 0, 255, 255, 255, 0]


def test_half_precision_and_float64_are_decoded_too():
    assert torch.equal(RGB().decode(RGB().encode(LEVELS).double()), LEVELS)
    assert RGB().decode(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.uint8


def test_the_shape_stays():
    assert RGB().shape(3, 20, 16) == (3, 20, 16)
