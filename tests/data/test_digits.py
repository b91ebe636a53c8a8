from __future__ import annotations

import pytest
import torch

from denoiselab.data.digits import Digits, load_digits_split


def digits(**changes):
    values = {"channels": 1, "resolution": 8, "num_classes": 10, "batch_size": 64, "seed": 0}
    return Digits(**(values | changes))


def test_the_split_is_fixed_and_stratified():
    train, train_labels = load_digits_split("train")
    test, test_labels = load_digits_split("test")
    assert train.shape == (1297, 1, 8, 8)
    assert test.shape == (500, 1, 8, 8)
    assert train.dtype == test.dtype == torch.uint8
    assert train_labels.dtype == test_labels.dtype == torch.int64
    assert test_labels.bincount().tolist() == [50] * 10
    assert train.max() == test.max() == 255
    everything = torch.cat([train, test]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no image is in both


def test_the_split_does_not_depend_on_the_seed():
    one, other = digits(seed=0), digits(seed=1, flip=True)
    for split in ("train", "test"):
        assert one.fingerprint(split) == other.fingerprint(split)
    # made with scikit-learn 1.9: a changed split or grey scale makes every published number another number
    assert one.fingerprint("train").startswith("21432cfd1066e47e")
    assert one.fingerprint("test").startswith("9f67a9db58afe27c")


def test_pixels_are_scaled_to_the_whole_range():
    from sklearn.datasets import load_digits

    images, labels = load_digits_split("test")
    source = torch.from_numpy(load_digits().images)
    matches = (source[:, None] * 255 / 16 - images[:20, 0]).abs().amax((-1, -2)) <= 0.5
    assert (matches.sum(0) == 1).all()
    assert load_digits().target[matches.int().argmax(0)].tolist() == labels[:20].tolist()


def test_the_declared_shape_must_be_that_of_the_digits():
    digits().check()
    digits(resolution=[8, 8]).check()
    for changes, line in [
        ({"channels": 3}, "channels=3: the digits have 1"),
        ({"resolution": 16}, "resolution=16: the digits are 8x8"),
        ({"resolution": [8, 9]}, r"resolution=\[8, 9\]: the digits are 8x8"),
        ({"num_classes": 7}, r"num_classes=7: the digits have 10 \(0 trains without labels\)"),
    ]:
        with pytest.raises(ValueError, match=f"^{line}$"):
            digits(**changes).check()


def test_without_classes_labels_are_null():
    module = digits(num_classes=0)
    module.check()
    assert {module.train_set()[i]["label"] for i in range(10)} == {-1}
    assert module.fingerprint("test") != digits().fingerprint("test")


def test_only_training_flips():
    module = digits(flip=True)
    assert module.train_set().flip
    assert not module.test_set().flip


def test_a_part_of_the_training_images_is_balanced_and_nested():
    whole = digits()
    assert digits(train_size=1297).fingerprint("train") == whole.fingerprint("train")
    parts = [digits(train_size=size) for size in (3, 25, 300)]
    sets = [{bytes(image.numpy().tobytes()) for image in part.train_set().images} for part in (*parts, whole)]
    assert [len(images) for images in sets] == [3, 25, 300, 1297]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert parts[0].train_set().labels.sort().values.tolist() == [0, 1, 2]
    assert parts[1].train_set().labels.bincount().tolist() == [3] * 5 + [2] * 5
    assert parts[2].train_set().labels.bincount().tolist() == [30] * 10
    assert len({part.fingerprint("train") for part in (*parts, whole)}) == 4
    assert {part.fingerprint("test") for part in parts} == {whole.fingerprint("test")}
    assert digits(train_size=25, num_classes=0).train_set().label(0) == -1


@pytest.mark.parametrize("size", [0, -1, 1298])
def test_the_size_of_the_training_set_is_checked(size):
    with pytest.raises(ValueError, match=f"^train_size={size}: must be from 1 to 1297, or null for all$"):
        digits(train_size=size)
