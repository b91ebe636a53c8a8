"""An exported pipeline, loaded from its folder, draws what our samplers draw from the same noise."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler, DiffusionPipeline
from elsewhere import built, node_of
from PIL import Image

from denoiselab.backbones.dit import DiT
from denoiselab.backbones.unet import UNet
from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.guidance import ClassifierFree
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMCosine, DDPMLinear, RectifiedFlow, Trigonometric, ZeroTerminalSNR
from denoiselab.diffusion.prediction import X0, Epsilon, V, Velocity
from denoiselab.diffusion.samplers import DDIM, EulerT, HeunT
from denoiselab.exchange.files import read
from denoiselab.exchange.networks import import_network
from denoiselab.exchange.schedulers import scheduler_for
from denoiselab.exchange.to_diffusers import make_pipeline, save_pipeline

STEPS = 10
LABEL = torch.tensor([0, 2, -1])
WIDE = {"resolution": [8, 16], "attention_resolutions": [8]}


def start(node):
    height, width = node["resolution"] if isinstance(node["resolution"], list) else [node["resolution"]] * 2
    return torch.randn(3, node["channels"], height, width, generator=torch.Generator().manual_seed(0))


def ours(node, path, prediction, sampler, x, guidance=None):
    denoiser = NetworkDenoiser(
        network=built(node), path=path, prediction=prediction, learned_variance=node["learned_variance"]
    )
    solver = sampler(grid=Uniform(), steps=STEPS)
    points = solver.points(path, STEPS)
    label = Condition(label=LABEL if node["num_classes"] else None)
    with torch.no_grad():
        return solver.integrate(
            guidance(denoiser) if guidance else denoiser, x, points, label, NoiseSource(0, torch.arange(3))
        )


def exported(node, path, prediction, folder, heun=False, steps=STEPS):
    """The pipeline, written and loaded again."""
    pipeline = make_pipeline(node, built(node).state_dict(), scheduler_for(path, prediction, heun=heun), steps)
    custom = save_pipeline(pipeline, folder)
    loaded = DiffusionPipeline.from_pretrained(folder, **{"trust_remote_code": True} if custom else {})
    loaded.set_progress_bar_config(disable=True)
    return loaded


def assert_drawn(got, want):
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * max(1.0, want.abs().max().item()))


CASES = {
    "unet, rectified flow, Euler": (node_of(UNet), RectifiedFlow(), Velocity(), EulerT),
    "unet, rectified flow, Heun": (node_of(UNet), RectifiedFlow(), Velocity(), HeunT),
    "unet, DDPM": (node_of(UNet), DDPMLinear(), Epsilon(), DDIM),
    "unet, cosine": (node_of(UNet, num_classes=0, **WIDE), Cosine(), V(), DDIM),
    "unet, learned variance": (node_of(UNet, num_classes=0, learned_variance=True), DDPMCosine(), X0(), DDIM),
    "unet, zero terminal SNR": (node_of(UNet), ZeroTerminalSNR(path=DDPMLinear()), V(), DDIM),
    "dit, rectified flow": (node_of(DiT), RectifiedFlow(t_max=0.999), Velocity(), EulerT),
    "dit, trigonometric": (node_of(DiT, num_classes=0), Trigonometric(), V(), DDIM),
    "dit, diffusers' time embedding": (node_of(DiT, frequency_shift=1), RectifiedFlow(), Velocity(), EulerT),
    "dit, learned variance": (node_of(DiT, learned_variance=True), DDPMCosine(), Epsilon(), DDIM),
}


@pytest.mark.parametrize("case", CASES)
def test_our_own_pipeline(case, tmp_path):
    node, path, prediction, sampler = CASES[case]
    noise = start(node)
    sigma = sampler(grid=Uniform(), steps=STEPS).points(path, STEPS)[0].sigma
    want = ours(node, path, prediction, sampler, sigma * noise)
    pipeline = exported(node, path, prediction, tmp_path / "pipeline", heun=sampler is HeunT)
    labels = {"class_labels": LABEL.tolist()} if node["num_classes"] else {}
    assert_drawn(pipeline(latents=noise, output_type="latent", **labels).images, want)
    imported = import_network(read(tmp_path / "pipeline"))
    assert imported.notes == []
    assert imported.backbone == ({"frequency_shift": 0} if "hidden_size" in node else {}) | node
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DenoiselabPipeline"]


@pytest.mark.parametrize(("path", "prediction"), [(DDPMLinear(), Epsilon()), (DDPMCosine(), V()), (DDPMCosine(), X0())])
def test_diffusers_own_pipeline(path, prediction, tmp_path):
    node = node_of(UNet, num_classes=0)
    pipeline = exported(node, path, prediction, tmp_path / "pipeline")
    assert type(pipeline) is DDIMPipeline
    assert not (tmp_path / "pipeline" / "pipeline.py").exists()
    generator = torch.Generator().manual_seed(0)
    got = pipeline(batch_size=3, generator=generator, num_inference_steps=STEPS, output_type="pt").images
    want = (ours(node, path, prediction, DDIM, start(node)) / 2 + 0.5).clamp(0, 1)
    assert_drawn(got, want)


def test_guidance(tmp_path):
    node, noise = node_of(UNet), start(node_of(UNet))
    pipeline = exported(node, RectifiedFlow(), Velocity(), tmp_path / "pipeline")
    want = ours(node, RectifiedFlow(), Velocity(), EulerT, noise, lambda denoiser: ClassifierFree(denoiser, scale=2.5))
    got = pipeline(class_labels=LABEL, latents=noise, guidance_scale=2.5, output_type="latent").images
    assert_drawn(got, want)
    plain = pipeline(class_labels=LABEL, latents=noise, output_type="latent").images
    assert (got - plain)[:2].abs().max() > 1e-2
    assert_drawn(got[2], plain[2])  # without a class there is nothing to follow


def test_what_the_call_takes_and_gives(tmp_path):
    pipeline = exported(node_of(UNet), RectifiedFlow(), Velocity(), tmp_path / "pipeline", steps=3)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(class_labels=[0, 1], generator=generator).images
    assert [type(picture) for picture in pictures] == [Image.Image] * 2
    assert (pictures[0].size, pictures[0].mode) == ((8, 8), "L")
    (array,) = pipeline(batch_size=2, num_inference_steps=1, output_type="np", return_dict=False)
    assert array.shape == (2, 8, 8, 1)
    assert pipeline(class_labels=[0]).images[0].size == (8, 8)
    noise = start(node_of(UNet))
    none = pipeline(latents=noise, output_type="latent").images
    torch.testing.assert_close(none, pipeline(class_labels=[3, -1, 3], latents=noise, output_type="latent").images)
    three = pipeline(latents=noise, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(none, three, rtol=0, atol=0)


def test_steps_of_ddim_are_equally_spaced():
    node = node_of(UNet)
    state = built(node).state_dict()
    for path, prediction, steps in ((DDPMLinear(), Epsilon(), 20), (RectifiedFlow(), Velocity(), 11)):
        assert make_pipeline(node, state, scheduler_for(path, prediction), 11).config.num_inference_steps == steps


def test_another_scheduler_of_diffusers_can_take_over(tmp_path):
    pipeline = exported(node_of(UNet), DDPMLinear(), Epsilon(), tmp_path / "pipeline")
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline(latents=start(node_of(UNet)), output_type="pt").images.isfinite().all()
