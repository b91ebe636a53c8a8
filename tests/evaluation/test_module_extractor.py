from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from test_features import images
from torch import nn

from denoiselab.evaluation.module_extractor import ModuleExtractor


class Net(nn.Module):
    """Two channels a pixel, and perhaps the mean of each as logits."""

    def __init__(self, classify=False):
        super().__init__()
        self.mix, self.classify = nn.Conv2d(3, 2, 1), classify

    def forward(self, x):
        y = self.mix(x)
        return (y, y.mean((2, 3))) if self.classify else y


class Renamed(Net):
    """Another class with the same weights."""


def extractor(**changes):
    return ModuleExtractor(**{"module": Net, "name": "mine", "resolution": 4} | changes)


@pytest.fixture
def weights(tmp_path):
    state = Net().state_dict()
    torch.save(state, tmp_path / "net.pth")
    save_file(state, tmp_path / "net.safetensors")
    return tmp_path


def test_any_module_gives_flat_features_of_the_named_weights(weights):
    mine = extractor(weights=str(weights / "net.pth"), bounds=(-1, 1), mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    mine.check(channels=3, resolution=8)
    assert mine.label == "mine"
    found = mine(images(3, 3), batch_size=2)
    assert found.features.shape == (3, 2 * 4 * 4)
    assert found.logits is None
    network = Net()
    network.load_state_dict(torch.load(weights / "net.pth", weights_only=True))
    x = torch.nn.functional.interpolate(images(3, 3).float(), (4, 4), mode="bilinear", antialias=True) / 127.5 - 1
    x = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    torch.testing.assert_close(found.features, network(x).detach().flatten(1), rtol=1e-5, atol=1e-6)
    assert "antialiased" in mine.resize
    assert "4x4" in mine.resize


def test_both_file_formats_are_one_and_grey_stands_for_rgb(weights):
    a, b = (extractor(weights=str(weights / name)) for name in ("net.pth", "net.safetensors"))
    assert a.hash == b.hash
    grey = images(2)
    assert torch.equal(a(grey).features, b(grey.expand(-1, 3, -1, -1)).features)


def test_the_hash_follows_weights_structure_and_preprocessing(weights, tmp_path):
    path = str(weights / "net.pth")
    state = torch.load(path, weights_only=True)
    state["mix.bias"][0] += 1e-3
    torch.save(state, tmp_path / "changed.pth")
    hashes = [
        extractor(weights=path).hash,
        extractor(weights=str(tmp_path / "changed.pth")).hash,
        extractor(weights=path, bounds=(-1, 1)).hash,
        extractor(weights=path, resolution=5).hash,
        extractor(weights=path, mean=[0.0, 0.0, 0.1]).hash,
        extractor(weights=path, name="other").hash,
        extractor(weights=path, module=Renamed).hash,
    ]
    assert len(set(hashes)) == 7
    assert extractor(weights=path, module=lambda: Net()).hash == hashes[0]


def test_without_weights_a_module_begins_the_same_and_no_generator_moves():
    before = torch.get_rng_state()
    first = extractor()(images(2)).features
    torch.rand(3)
    assert torch.equal(extractor()(images(2)).features, first)
    torch.set_rng_state(before)
    mine = extractor()
    mine.check(channels=1, resolution=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not isinstance(mine, nn.Module)


def test_logits_are_given_through_and_held_to_the_number_of_classes():
    classifier = partial(Net, classify=True)
    mine = extractor(module=classifier, num_classes=2, resolution=None)
    mine.check(channels=3, resolution=[2, 4])
    assert mine(images(5, 3)).logits.shape == (5, 2)
    for module, given in ((classifier, "2"), (Net, "no")):
        with pytest.raises(ValueError, match=f"^num_classes=10: the module gives {given} logits"):
            extractor(module=module, num_classes=10).check(channels=3, resolution=8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "My Net"}, "name=My Net: "),
        ({"name": "inception2"}, "name=inception2: "),
        ({"name": "digits"}, "name=digits: "),
        ({"resolution": 0}, "resolution=0: "),
        ({"channels": 4}, "channels=4: "),
        ({"bounds": (1, 0)}, "bounds=[1, 0]: "),
        ({"mean": [0.5]}, "mean=[0.5]: "),
        ({"std": [1, 1, 0]}, "std=[1, 1, 0]: "),
    ],
)
def test_bad_values_are_named(bad, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        extractor(**bad)


def test_a_module_that_is_built_too_early_is_refused():
    with pytest.raises(ValueError, match="^module=Net: .*_partial_: true"):
        extractor(module=Net())


def test_what_does_not_fit_shows_at_the_start_in_one_line(weights, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"x")
    cases = [
        (extractor(module=partial(Net, depth=3)), "module=mine: cannot be built .*depth"),
        (extractor(channels=1), "module=mine: cannot take"),
        (extractor(weights=str(tmp_path / "nowhere.pth")), "no such file"),
        (extractor(weights=str(tmp_path / "other.safetensors")), "must be a state dict of the module"),
        (extractor(weights=str(tmp_path / "broken.pth")), "must be a state dict of the module"),
    ]
    for mine, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            mine.check(channels=1, resolution=8)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^channels=3: "):
        extractor(channels=1).check(channels=3, resolution=8)
