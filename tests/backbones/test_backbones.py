"""What every backbone promises, and the shipped configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.song_unet import SongUNet
from denoiselab.backbones.unet import UNet
from denoiselab.condition import Condition

CONF = Path(__file__).parents[2] / "conf"


def unet(resolution=8, num_classes=3, scale_shift=False, learned_variance=False):
    return UNet(
        channels=2,
        resolution=resolution,
        num_classes=num_classes,
        width=16,
        multipliers=[1, 2],
        blocks=1,
        attention_resolutions=[8],
        head_channels=8,
        dropout=0.0,
        scale_shift=scale_shift,
        learned_variance=learned_variance,
    )


def film_unet(resolution=8, num_classes=3, learned_variance=False):
    return unet(resolution, num_classes, scale_shift=True, learned_variance=learned_variance)


def song_unet(resolution=8, num_classes=3, learned_variance=False):
    return SongUNet(
        channels=2,
        resolution=resolution,
        num_classes=num_classes,
        augment_dim=0,
        width=16,
        multipliers=[1, 2],
        blocks=1,
        attention_resolutions=[8],
        dropout=0.0,
        time_embedding="positional",
        time_multiplier=1,
        encoder="residual",
        resample_filter=[1, 3, 3, 1],
        learned_variance=learned_variance,
    )


def dit(resolution=8, num_classes=3, learned_variance=False):
    return DiT(
        channels=2,
        resolution=resolution,
        num_classes=num_classes,
        patch_size=2,
        hidden_size=32,
        depth=2,
        num_heads=4,
        learned_variance=learned_variance,
    )


every_backbone = pytest.mark.parametrize("build", [unet, film_unet, song_unet, dit])


def perturbed(net):
    """The network away from its zero initialisation, where the output would say nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def batch(height=8, width=8):
    """Four samples: every class of three, and the null label."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 2, height, width, generator=generator)
    return x, torch.tensor([0.5, 20.0, 400.0, 999.0]), Condition(label=torch.tensor([0, 1, 2, -1]))


@every_backbone
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (16, 8)])
def test_output_has_the_shape_of_the_input(build, height, width):
    net = perturbed(build(resolution=[height, width]))
    output = net(*batch(height, width))
    assert output.shape == (4, 2, height, width)
    assert output.isfinite().all()


@every_backbone
def test_a_learned_variance_doubles_the_channels_of_the_output(build):
    net = perturbed(build(learned_variance=True))
    output = net(*batch())
    assert output.shape == (4, 4, 8, 8)
    prediction, variance = output.chunk(2, dim=1)
    assert (prediction - variance).norm() > 0.1 * prediction.norm()


@every_backbone
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_types(build, dtype, tolerance):
    net = perturbed(build())
    x, t, condition = batch()
    want = net(x, t, condition)
    got = net.to(dtype)(x.to(dtype), t, condition)
    assert got.dtype == dtype
    assert (got.double() - want.double()).norm() < tolerance * want.norm()


@every_backbone
def test_samples_do_not_see_each_other(build):
    net = perturbed(build())
    x, t, condition = batch()
    together = net(x, t, condition)
    for i in range(4):
        alone = net(x[i : i + 1], t[i : i + 1], Condition(label=condition.label[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


@every_backbone
def test_labels_and_times_matter(build):
    net = perturbed(build())
    x = batch()[0][:1].expand(4, -1, -1, -1)
    by_label = net(x, torch.full((4,), 300.0), Condition(label=torch.tensor([0, 1, 2, -1])))
    by_time = net(x, torch.tensor([1.0, 50.0, 300.0, 900.0]), Condition(label=torch.full((4,), -1)))
    for outputs in (by_label, by_time):
        for i in range(4):
            for j in range(i):
                assert (outputs[i] - outputs[j]).norm() > 1e-2 * outputs[i].norm()


@every_backbone
def test_without_classes_there_is_no_label_embedding(build):
    net = perturbed(build(num_classes=0))
    assert not any("label" in name for name, _ in net.named_parameters())
    x, t, condition = batch()
    assert torch.equal(net(x, t, Condition()), net(x, t, condition))


@every_backbone
def test_with_classes_labels_are_needed(build):
    x, t, _ = batch()
    with pytest.raises(ValueError, match="label=None: must be given to a network of 3 classes"):
        build()(x, t, Condition())


@every_backbone
def test_every_parameter_learns(build):
    torch.manual_seed(0)
    net = build()
    x, t, condition = batch()
    target = torch.randn_like(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        ((net(x, t, condition) - target) ** 2).sum().backward()
        # A gradient of None would make plain DDP wait for it for ever.
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        optimizer.step()
    # Adding one vector to all keys changes no softmax: the gradient of their bias is zero by nature.
    largest = {name: p.grad.abs().max() for name, p in net.named_parameters() if not name.endswith(".k.bias")}
    assert [name for name, gradient in largest.items() if gradient < 1e-5] == []
    assert net.label_embedding.weight.grad.abs().amax(dim=1).min() > 1e-5


@pytest.mark.parametrize(
    ("name", "data", "millions"),
    [
        ("unet", (1, 8, 10), 0.76),
        ("unet_fashion", (1, 28, 10), 5.3),
        ("unet_ddpm_cifar10", (3, 32, 0), 35.746307),
        ("ddpmpp_cifar10", (3, 32, 10), 55.735299),
        ("ncsnpp_cifar10", (3, 32, 10), 56.400643),
        ("unet_iddpm_cifar10", (3, 32, 0), 52.5),
        ("unet_torchcfm_cifar10", (3, 32, 0), 35.746307),
        ("ddpmpp_score_sde_cifar10", (3, 32, 0), 61.804419),
        ("ncsnpp_score_sde_cifar10", (3, 32, 0), 62.758787),
        ("dit", (1, 8, 10), 1.27),
        ("dit_s_2", (4, 32, 1000), 33),
        ("dit_b_2", (4, 32, 1000), 130),
        ("dit_l_2", (4, 32, 1000), 458),
        ("dit_xl_2", (4, 32, 1000), 675),
    ],
)
def test_shipped_configs(name, data, millions):
    values = zip(("channels", "resolution", "num_classes"), data, strict=True)
    overrides = [f"+backbone={name}", *(f"+datamodule.{key}={value}" for key, value in values)]
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[*overrides, "+objective.learned_variance=false", "+augmentation.dim=0"])
    with torch.device("meta"):
        net = instantiate(config.backbone)
        x = torch.empty(2, data[0], data[1], data[1])
        output = net(x, torch.empty(2), Condition(label=torch.empty(2, dtype=torch.int64)))
    assert output.shape == x.shape
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1e6 * millions, rel=1e-2)


def test_every_shipped_config_is_listed_above():
    listed = {arguments[0] for arguments in test_shipped_configs.pytestmark[0].args[1]}
    assert listed == {path.stem for path in (CONF / "backbone").glob("*.yaml")}
