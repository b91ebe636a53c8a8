"""What mixed precision must not round: normalisation statistics, coefficients, times, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_objective
from torch import nn

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.song_unet import SongUNet
from denoiselab.backbones.unet import UNet
from denoiselab.condition import Condition
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import RectifiedFlow
from denoiselab.diffusion.prediction import EDM
from denoiselab.diffusion.time_sampling import LossImportance
from denoiselab.diffusion.weighting import EDMWeight, LearnedUncertainty

SHARED = {"channels": 2, "resolution": 8, "num_classes": 3, "learned_variance": True}
UNET = {"width": 16, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": [4], "dropout": 0.0}
SONG = {"augment_dim": 0, "time_multiplier": 1}
BACKBONES = {
    "unet": lambda: UNet(**SHARED, **UNET, head_channels=None, scale_shift=False),
    "unet scale_shift": lambda: UNet(**SHARED, **UNET, head_channels=8, scale_shift=True),
    "ddpm++": lambda: SongUNet(
        **SHARED, **UNET, **SONG, time_embedding="positional", encoder="standard", resample_filter=[1, 1]
    ),
    "ncsn++": lambda: SongUNet(
        **SHARED, **UNET, **SONG, time_embedding="fourier", encoder="residual", resample_filter=[1, 3, 3, 1]
    ),
    "dit": lambda: DiT(**SHARED, patch_size=2, hidden_size=32, depth=2, num_heads=2),
}


def network_of(name):
    """A backbone none of whose layers is zero, and whose features have a mean of a hundred times their deviation."""
    torch.manual_seed(0)
    network = BACKBONES[name]()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3)
    first = network.patches if name == "dit" else network.conv_in
    with torch.no_grad():
        first.bias += 100
    return network


def reference(norm, x):
    """What the layer is, in float64, of the very input that it got."""
    weight, bias = (None if p is None else p.detach().double() for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


@pytest.mark.parametrize("name", BACKBONES)
def test_norms_have_float32_statistics(name):
    network, seen = network_of(name), []
    norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm | nn.LayerNorm)]
    hooks = [
        norm.register_forward_hook(lambda norm, inputs, output: seen.append((norm, inputs[0].detach(), output)))
        for norm in norms
    ]
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(4, 2, 8, 8), torch.rand(4), Condition(label=torch.tensor([0, 1, 2, -1])))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(norms)
    far = 0.0
    for norm, x, output in seen:
        exact = reference(norm, x.double())
        scale = float(exact.abs().max())
        torch.testing.assert_close(output.double(), exact, rtol=0, atol=2**-7 * scale)
        far = max(far, float(x.double().mean().abs() / x.double().std()))

        inner, outer = (part.clone().requires_grad_() for part in (x, x.double()))
        upstream = torch.randn_like(exact)
        with torch.autocast("cpu", torch.bfloat16):
            output = norm(inner)
        (found,) = torch.autograd.grad(output, inner, upstream.to(output.dtype))
        (expected,) = torch.autograd.grad(reference(norm, outer), outer, upstream)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-6 * float(expected.abs().max()))
    assert far > 20  # statistics of bfloat16 would have been seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"path": RectifiedFlow(t_max=0.999), "prediction": EDM(), "weighting": EDMWeight()},
        {"learned_variance": True},
    ],
)
def test_losses_coefficients_and_times_are_not_rounded(changes):
    told = []

    def network(x, t, condition):
        told.append((x, t))
        return torch.cat([0.5 * x, x], dim=1).to(torch.bfloat16)[:, : 2 * (1 + objective.learned_variance)]

    objective = tiny_objective(**changes, label_dropout=0.0)
    x0, noise = torch.rand(4, 2, 8, 8) * 2 - 1, NoiseSource(0, torch.arange(4), 3)
    exact = objective(network, x0, Condition(label=None), noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss, t = objective(network, x0, Condition(label=None), noise)
        coefficients = objective.path.coefficients(t)
        pair = objective.prediction.ab(coefficients)
    assert {c.dtype for c in (t, *coefficients, *pair)} == {torch.float64}
    assert (told[1][0].dtype, told[1][1].dtype) == (torch.float32, torch.float32)
    assert torch.equal(told[1][0], told[0][0])
    assert torch.equal(loss, exact.loss)
    assert loss.dtype in (torch.float32, torch.float64)


def test_what_objectives_learn_is_not_rounded():
    weighting, law = LearnedUncertainty(over=EDMWeight(), channels=16), LossImportance(bins=2)
    nn.init.normal_(weighting.linear)
    objective = tiny_objective(weighting=weighting, time_sampling=law)
    t = torch.rand(64, dtype=torch.float64) * 0.9 + 0.05
    exact = weighting.log_uncertainty(objective.path, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighting.log_uncertainty(objective.path, t)
        objective.observe(t, torch.rand(64))
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)
    assert law.losses.dtype == torch.float64
