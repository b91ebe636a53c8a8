from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DModel

from denoiselab.backbones.unet import UNet
from denoiselab.condition import Condition
from denoiselab.exchange.keys import renamed
from denoiselab.exchange.unet import DIFFUSERS_NAMES

DDPM = {
    "channels": 3,
    "resolution": 32,
    "num_classes": 0,
    "width": 128,
    "multipliers": [1, 2, 2, 2],
    "blocks": 2,
    "attention_resolutions": [16],
    "head_channels": None,
    "dropout": 0.1,
    "scale_shift": False,
}
SMALL = DDPM | {
    "channels": 1,
    "resolution": 8,
    "width": 32,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_resolutions": [4],
}


@pytest.mark.parametrize(("width", "groups", "scale_shift"), [(128, 32, False), (28, 7, True)])
def test_is_the_network_of_diffusers(width, groups, scale_shift):
    torch.manual_seed(0)
    theirs = UNet2DModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    ).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = UNet(**DDPM | {"width": width, "scale_shift": scale_shift}).eval()
    state = theirs.state_dict()
    ours.load_state_dict({name: state.pop(renamed(name, DIFFUSERS_NAMES)) for name in ours.state_dict()})
    assert not state

    x, t = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([7.0, 850.5])
    with torch.no_grad():
        got, want = ours.double()(x, t, Condition()), theirs.double()(x, t).sample
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_ddpm_cifar10_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**DDPM).parameters()) == 35_746_307


def test_begins_as_zero_and_every_residual_branch_as_nothing():
    net = UNet(**SMALL)
    zero = {name.rsplit(".", 1)[0] for name, p in net.named_parameters() if name.endswith("weight") and not p.any()}
    want = {name for name, _ in net.named_modules() if re.search(r"(conv2|attention.*\.out|conv_out)$", name)}
    assert zero == want
    assert len(want) == 8 + 4 + 1  # blocks, attentions, the output
    x = torch.randn(2, 1, 8, 8)
    assert not net(x, torch.tensor([1.0, 900.0]), Condition()).any()


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_reaches_the_output_of_a_narrow_network(scale_shift):
    torch.manual_seed(0)
    net = UNet(**SMALL | {"scale_shift": scale_shift}).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    early, late = net(x, torch.tensor([10.0, 900.0]), Condition())
    # A constant over the image could come from the output's bias alone: the pattern must change.
    assert (early - late).std() > 1e-2 * early.std()


def test_all_layers_have_the_same_number_of_groups():
    net = UNet(**SMALL | {"width": 56, "multipliers": [1, 2, 3], "attention_resolutions": [8]})
    assert {m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)} == {14}


def test_attention_sits_where_the_longer_side_says():
    net = UNet(**SMALL | {"resolution": [8, 16], "attention_resolutions": [16], "head_channels": 16})
    heads = {name: m.heads for name, m in net.named_modules() if hasattr(m, "heads")}
    assert heads == {
        "down.0.attentions.0": 2,
        "middle.attention": 4,
        "up.1.attentions.0": 2,
        "up.1.attentions.1": 2,
    }


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net = UNet(**SMALL | {"dropout": 0.5})
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    arguments = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 500.0]), Condition()
    assert not torch.equal(net(*arguments), net(*arguments))
    net.eval()
    assert torch.equal(net(*arguments), net(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels=0: must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1: must be at least 0"),
        ({"width": 33}, "width=33: must be even and at least 4"),
        ({"multipliers": []}, "multipliers=[]: must be one or more integers of at least 1"),
        ({"multipliers": [1, 0]}, "multipliers=[1, 0]: must be one or more integers of at least 1"),
        ({"blocks": 0}, "blocks=0: must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
        ({"dropout": -0.1}, "dropout=-0.1: must be in [0, 1)"),
        ({"resolution": 9}, "resolution=9: must be divisible by 2 for 2 levels"),
        ({"resolution": [8, 7]}, "resolution=[8, 7]: must be divisible by 2 for 2 levels"),
        (
            {"attention_resolutions": [4, 5]},
            "attention_resolutions=[4, 5]: must be among the longer sides of the levels, [8, 4]",
        ),
        (
            {"head_channels": 24},
            "head_channels=24: must divide the channels of the levels with attention, [64]",
        ),
        (
            {"head_channels": 0},
            "head_channels=0: must divide the channels of the levels with attention, [64]",
        ),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        UNet(**SMALL | change)
