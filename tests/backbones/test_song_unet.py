from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from denoiselab.backbones.song_unet import Resample, SongUNet, edm_names
from denoiselab.condition import Condition

ROOT = Path(__file__).parents[2]
GOLDENS = json.loads((ROOT / "tests/goldens/song_unet.json").read_text())

# 96 and more channels in the middle and on the way up: numbers of groups below and at the limit of 32.
DDPMPP = {
    "channels": 3,
    "resolution": 8,
    "num_classes": 5,
    "augment_dim": 9,
    "width": 16,
    "multipliers": [2, 4, 6],
    "blocks": 1,
    "attention_resolutions": [4],
    "dropout": 0.13,
    "time_embedding": "positional",
    "time_multiplier": 1,
    "encoder": "standard",
    "resample_filter": [1, 1],
}
NCSNPP = DDPMPP | {
    "time_embedding": "fourier",
    "time_multiplier": 2,
    "encoder": "residual",
    "resample_filter": [1, 3, 3, 1],
}
ARCHITECTURES = {"ddpmpp": DDPMPP, "ncsnpp": NCSNPP}


def fill(name, shape):
    """Weights that follow from EDM's name of a tensor and its shape: sin(i² + n) at its i-th place, n from the name."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(i**2 + zlib.crc32(name.encode()) % 1000).view(shape)
    if len(shape) > 1:
        return wave * math.sqrt(2 / math.prod(shape[1:]))
    if "freqs" in name:
        return 16 * wave
    return 1 + wave / 4 if re.search(r"norm.*\.weight", name) else wave / 4


def filled(settings):
    net = SongUNet(**settings).double().eval()
    names = edm_names(net)
    net.load_state_dict({name: fill(names[name], value.shape) for name, value in net.state_dict().items()})
    return net


def golden_input(augmented):
    """Three samples: two classes and the null label, at a noise of 0.002, 1.3 and 80."""
    augment = fill("augment", (3, 9)) if augmented else None
    condition = Condition(label=torch.tensor([0, 4, -1]), augment=augment)
    return 3 * fill("x", (3, 3, 8, 8)), torch.tensor([0.002, 1.3, 80.0], dtype=torch.float64).log() / 4, condition


CASES = {
    "unconditional": ({"num_classes": 0, "augment_dim": 0}, False),
    "conditional": ({}, False),
    "conditional, augmented": ({}, True),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_the_network_of_edm(architecture, case, dtype, tolerance):
    change, augmented = CASES[case]
    net = filled(ARCHITECTURES[architecture] | change).to(dtype)
    x, t, condition = golden_input(augmented)
    with torch.no_grad():
        got = net(x.to(dtype), t.to(dtype), condition).double().flatten()[::11]
    want = torch.tensor(GOLDENS["outputs"][architecture][case], dtype=torch.float64)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_shapes_are_those_of_the_published_networks(architecture):
    data = ["+datamodule.channels=3", "+datamodule.resolution=32", "+datamodule.num_classes=10"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose(overrides=[f"+backbone={architecture}_cifar10", *data, "+objective.learned_variance=false"])
    with torch.device("meta"):
        net = instantiate(config.backbone)
    names = edm_names(net)
    ours = {names[name]: list(value.shape) for name, value in net.state_dict().items()}
    theirs = GOLDENS["shapes"][architecture]
    assert {name: shape for name, shape in theirs.items() if not name.endswith(".resample_filter")} == ours
    assert len(ours) == len(names)


def test_resampling_closed_forms():
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(Resample("down", [1, 1])(x), F.avg_pool2d(x, 2))
    torch.testing.assert_close(Resample("up", [2, 2])(x), F.interpolate(x, scale_factor=2))
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(Resample("up", [1, 3, 3, 1])(x)[..., 1:-1, 1:-1], bilinear[..., 1:-1, 1:-1])
    # Downsampling is the transpose of upsampling.
    y = torch.randn(2, 3, 12, 16)
    up, down = Resample("up", [1, 3, 3, 1])(x), Resample("down", [1, 3, 3, 1])(y)
    torch.testing.assert_close((up * y).sum(), 4 * (x * down).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [DDPMPP, NCSNPP])
def test_initialisation(settings):
    torch.manual_seed(0)
    net = SongUNet(**settings | {"width": 32})
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            gain = 1.0
            if "conv2" in name or "attention.out" in name or "conv_out" in name:
                gain = 1e-5
            if "qkv" in name:
                gain = 0.2**0.5
            receptive = p[0, 0].numel()
            bound = gain * math.sqrt(6 / (receptive * (p.shape[0] + p.shape[1])))
            assert 0.95 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name


def test_frequencies_belong_to_the_weights():
    torch.manual_seed(0)
    nets = [SongUNet(**NCSNPP | {"width": 128, "multipliers": [1]} | {"attention_resolutions": []}) for _ in range(2)]
    first, second = (net.time_embedding.frequencies for net in nets)
    assert first.std().item() == pytest.approx(16, rel=0.2)
    assert not torch.equal(first, second)
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(first, second)


def test_no_augmentation_is_a_label_of_zeros_and_still_trains_its_layer():
    net = filled(DDPMPP)
    x, t, condition = golden_input(augmented=False)
    zeros = Condition(label=condition.label, augment=torch.zeros(3, 9))
    output = net(x, t, condition)
    assert torch.equal(output, net(x, t, zeros))
    output.sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("label", [-2, 6])
def test_labels_beyond_the_classes_are_no_one_hot_vectors(label):
    x, t, _ = golden_input(augmented=False)
    with pytest.raises(RuntimeError, match="Class values"):
        filled(DDPMPP)(x, t, Condition(label=torch.full((3,), label)))


def test_attention_sits_where_the_longer_side_says():
    net = SongUNet(**DDPMPP | {"resolution": [8, 16], "multipliers": [1, 1], "attention_resolutions": [16]})
    attended = [name for name, _ in net.named_modules() if name.endswith("attention.qkv")]
    assert attended == ["down.0.attention.qkv", "middle.0.attention.qkv", "up.4.attention.qkv"]
    lowest = SongUNet(**DDPMPP | {"attention_resolutions": "lowest"})
    assert lowest.down[4].attention.qkv.in_channels == 96


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net, arguments = filled(DDPMPP), golden_input(augmented=False)
    assert torch.equal(net(*arguments), net(*arguments))
    net.train()
    assert not torch.equal(net(*arguments), net(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels=0: must be at least 1"),
        ({"width": 33}, "width=33: must be even and at least 4"),
        ({"augment_dim": -1}, "augment_dim=-1: must be at least 0"),
        ({"time_multiplier": 0}, "time_multiplier=0: must be at least 1"),
        (
            {"resample_filter": [1, 2, 1]},
            "resample_filter=[1, 2, 1]: must be an even number of taps with a positive sum",
        ),
        ({"resample_filter": []}, "resample_filter=[]: must be an even number of taps with a positive sum"),
        ({"resolution": 10}, "resolution=10: must be divisible by 4 for 3 levels"),
        (
            {"attention_resolutions": [16]},
            "attention_resolutions=[16]: must be among the longer sides of the levels, [8, 4, 2]",
        ),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SongUNet(**DDPMPP | change)
