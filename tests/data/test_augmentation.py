from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from denoiselab.data.augmentation import SYM6, Change, EDMAugmentation, NoAugmentation, apply
from denoiselab.diffusion.noise import NoiseSource

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = torch.rand(6, 3, 16, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def change(batch=1, **values):
    """One change for all images of a batch; what is not named is nothing."""
    flags = {key: torch.full((batch,), bool(values.pop(key, False))) for key in ("xflip", "yflip")}
    shift = torch.tensor(values.pop("shift", (0.0, 0.0))).expand(batch, 2)
    numbers = {key: torch.full((batch,), values.pop(key, 0.0)) for key in ("scale", "angle", "stretch", "axis")}
    assert not values
    return Change(**flags, **numbers, shift=shift)


def noise(batch=6, seed=0, step=0):
    return NoiseSource(seed, torch.arange(batch), step)


def test_the_filter_is_the_orthonormal_low_pass_with_six_vanishing_moments():
    h, k = np.array(SYM6), np.arange(12)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-10)
    for lag in range(6):
        assert (h[2 * lag :] * h[: 12 - 2 * lag]).sum() == pytest.approx(float(lag == 0), abs=1e-10)
    for moment in range(6):
        terms = (-1.0) ** k * (k / 11) ** moment * h
        assert abs(terms.sum()) < 1e-7 * np.abs(terms).sum()


# -- what is exact --


def test_with_probability_zero_nothing_happens():
    images, labels = EDMAugmentation(dim=9, p=0.0, p_xflip=0.0)(IMAGES, noise())
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, torch.zeros(6, 9))


def test_mirroring_is_exact_and_noted_in_the_first_label():
    images = IMAGES.repeat(40, 1, 1, 1)
    mirrored, labels = EDMAugmentation(dim=9, p=0.0, p_xflip=1.0)(images, noise(240))
    flipped = labels[:, 0] == 1
    assert 0.4 < flipped.float().mean() < 0.6
    assert torch.equal(mirrored[flipped], images[flipped].flip(3))
    assert torch.equal(mirrored[~flipped], images[~flipped])
    assert not labels[:, 1:].any()
    upside_down = apply(change(6, yflip=True), IMAGES)
    assert torch.equal(upside_down, IMAGES.flip(2))


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-1, 5)])
def test_a_shift_by_whole_pixels_moves_them_and_mirrors_at_the_border(right, down):
    shifted = apply(change(6, shift=(right / (0.125 * 12), down / (0.125 * 16))), IMAGES)
    wide = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
    expected = wide[:, :, 5 - down : 21 - down, 5 - right : 17 - right]
    np.testing.assert_allclose(shifted, expected, atol=2e-5)


# -- what changes where: against a function that is known between the pixels --

SIDE = 48
ROW, COLUMN = torch.meshgrid(*2 * [torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2], indexing="ij")
# The low pass has its mean at tap 5.1, not 5: everything turns and grows about a point 0.05 pixels off the centre.
OFF = sum(k * h for k, h in enumerate(SYM6)) / math.sqrt(2) / 2 - 5 / 2


def wave(x, y):
    """A band-limited picture, x to the right and y down from the centre, without any symmetry."""
    return 0.5 * torch.sin(0.31 * x + 0.12 * y + 0.4) + 0.5 * torch.cos(0.23 * y - 0.17 * x + 1.1)


def check_wave(what, source):
    """The changed picture at (x, y) is the picture at source(x, y), away from the border."""
    changed = apply(what, wave(COLUMN, ROW).float()[None, None])[0, 0]
    x, y = source(COLUMN + OFF, ROW + OFF)
    expected, inner = wave(x - OFF, y - OFF), (slice(14, SIDE - 14), slice(14, SIDE - 14))
    torch.testing.assert_close(changed[inner], expected.float()[inner], atol=5e-3, rtol=0)  # linear between fine pixels
    assert (expected - wave(COLUMN, ROW))[inner].abs().max() > 0.1


@pytest.mark.parametrize("w", [-1.5, 1.0])
def test_scale_is_in_fifths_of_an_octave(w):
    check_wave(change(scale=w), lambda x, y: (x / 2 ** (0.2 * w), y / 2 ** (0.2 * w)))


@pytest.mark.parametrize("angle", [0.1, -0.7, math.pi / 2, 2.5])
def test_a_turn_moves_what_is_right_of_the_centre_up(angle):
    cos, sin = math.cos(angle), math.sin(angle)
    check_wave(change(angle=angle), lambda x, y: (cos * x - sin * y, sin * x + cos * y))


def test_a_stretch_widens_along_its_axis_and_narrows_across():
    s = 2 ** (0.2 * 1.5)
    check_wave(change(stretch=1.5), lambda x, y: (x / s, y * s))
    check_wave(change(stretch=1.5, axis=math.pi / 2), lambda x, y: (x * s, y / s))

    def up_and_right(x, y):
        along, across = (x - y) / 2, (x + y) / 2
        return along / s + across * s, -along / s + across * s

    check_wave(change(stretch=1.5, axis=math.pi / 4), up_and_right)


def test_a_shift_is_in_eighths_of_the_side():
    check_wave(change(shift=(0.35, -0.2)), lambda x, y: (x - 0.35 * SIDE / 8, y + 0.2 * SIDE / 8))


def test_the_original_changes_the_same():
    golden = json.loads((GOLDENS / "edm_augmentation.json").read_text())
    what = Change(**{key: torch.tensor(values, dtype=torch.float32) for key, values in golden["change"].items()})
    what = what._replace(xflip=what.xflip.bool(), yflip=what.yflip.bool())
    i, c = torch.arange(16, dtype=torch.float64), torch.arange(2, dtype=torch.float64)
    image = (torch.sin(0.7 * i[:, None] + 0.4 * c[:, None, None]) * torch.cos(0.5 * i)).float()
    changed = apply(what, image.expand(6, -1, -1, -1))
    seen = [[float(picture[tuple(point)]) for point in golden["points"]] for picture in changed]
    np.testing.assert_allclose(seen, golden["pixels"], atol=1e-5)  # coordinates are float32
    np.testing.assert_allclose(what.labels(), golden["labels"], atol=2e-6)


# -- the draws --


def test_an_image_is_changed_alike_whatever_the_batch():
    pipeline = EDMAugmentation(dim=9, p=0.8, p_xflip=1.0)
    images, labels = pipeline(IMAGES, noise(seed=3))
    for i in range(6):
        image, label = pipeline(IMAGES[i : i + 1], NoiseSource(3, torch.tensor([i])))
        assert torch.equal(label[0], labels[i])
        torch.testing.assert_close(image[0], images[i], atol=1e-6, rtol=0)


def test_the_draws_are_those_of_the_noise_alone():
    pipeline = EDMAugmentation(dim=9, p=1.0, p_xflip=1.0)
    state = torch.get_rng_state()
    images, labels = pipeline(IMAGES, noise())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(pipeline(IMAGES, noise())[0], images)
    for other in (noise(seed=1), noise(step=1)):
        assert not (pipeline.draw(other).labels()[:, 2:5] == labels[:, 2:5]).any()


def test_each_change_is_as_frequent_and_as_strong_as_published():
    count = 20_000
    what = EDMAugmentation(dim=9, p=0.12, p_xflip=1.0).draw(noise(count))
    labels = what.labels()
    often = (labels != 0).float().mean(0)
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12])
    torch.testing.assert_close(often, expected, atol=0.012, rtol=0)
    for strength in (what.scale, what.stretch, *what.shift.T):
        drawn = strength[strength != 0]
        assert abs(drawn.mean()) < 0.08
        assert abs(drawn.std() - 1) < 0.06
    for angle in (what.angle, what.axis):
        drawn = angle[angle != 0]
        assert drawn.abs().max() <= math.pi
        assert abs(drawn.std() - math.pi / math.sqrt(3)) < 0.06
    nothing = ~what.is_geometric()
    assert abs(nothing.float().mean() - 0.88**4) < 0.015
    assert torch.equal(labels[nothing, 2:5], torch.zeros(int(nothing.sum()), 3))


def test_labels_are_zero_where_nothing_happens_and_say_what_does():
    assert not change().labels().any()
    what = change(xflip=True, yflip=True, scale=0.5, angle=1.0, stretch=2.0, axis=0.3, shift=(-1.0, 0.7))
    told = [1, 1, 0.5, math.cos(1) - 1, math.sin(1), 2 * math.cos(0.3), 2 * math.sin(0.3), -1, 0.7]
    torch.testing.assert_close(what.labels(), torch.tensor([told]))


def test_autocast_does_not_coarsen_the_images():
    pipeline = EDMAugmentation(dim=9, p=1.0, p_xflip=1.0)
    expected, _ = pipeline(IMAGES, noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images, labels = pipeline(IMAGES, noise())
    assert images.dtype == labels.dtype == torch.float32
    assert torch.equal(images, expected)


def test_no_augmentation():
    images, labels = NoAugmentation(dim=0)(IMAGES, noise())
    assert images is IMAGES
    assert labels is None


def test_values_out_of_range():
    for make, line in [
        (lambda: NoAugmentation(dim=9), "dim=9: must be 0, there is no augmentation"),
        (lambda: EDMAugmentation(dim=0, p=0.1, p_xflip=1.0), "dim=0: must be 9, the labels of this augmentation"),
        (lambda: EDMAugmentation(dim=9, p=1.5, p_xflip=1.0), "p=1.5: must be from 0 to 1"),
        (lambda: EDMAugmentation(dim=9, p=0.1, p_xflip=-1.0), "p_xflip=-1.0: must be from 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=f"^{line}$"):
            make()
