from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from denoiselab.codecs.sd_vae import SDVAE
from denoiselab.diffusion.noise import NoiseSource

IMAGES = torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def codec(folder, **changes):
    values = {"scale": 0.5, "shift": 0.25, "batch": 2}
    return SDVAE(weights=None if folder is None else str(folder), **(values | changes))


@pytest.fixture(scope="session")
def posterior(autoencoder_folder):
    """What diffusers makes of the images."""
    with torch.no_grad():
        return AutoencoderKL.from_pretrained(autoencoder_folder).encode(IMAGES.float() / 127.5 - 1).latent_dist


def test_without_noise_the_latents_are_the_scaled_mean(autoencoder_folder, posterior):
    latents = codec(autoencoder_folder).encode(IMAGES)
    assert latents.dtype == torch.float32
    assert latents.std() > 0.01
    torch.testing.assert_close(latents, (posterior.mean - 0.25) * 0.5, atol=1e-6, rtol=0)


def test_with_noise_they_are_drawn_from_the_posterior(autoencoder_folder, posterior):
    state = torch.get_rng_state()
    latents = codec(autoencoder_folder).encode(IMAGES, NoiseSource(7, torch.arange(5)))
    assert torch.equal(torch.get_rng_state(), state)
    eps = NoiseSource(7, torch.arange(5)).normal("posterior", (4, 4, 6))
    expected = (posterior.mean + posterior.std * eps - 0.25) * 0.5
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)
    alone = codec(autoencoder_folder).encode(IMAGES[3:4], NoiseSource(7, torch.tensor([3])))
    torch.testing.assert_close(alone, latents[3:4], atol=1e-6, rtol=0)
    assert not torch.allclose(codec(autoencoder_folder).encode(IMAGES, NoiseSource(7, torch.arange(5), 1)), latents)


def test_decoding_undoes_scale_and_shift_and_rounds_to_grey_levels(autoencoder_folder):
    z = torch.randn(5, 4, 4, 6)
    images = codec(autoencoder_folder).decode((z - 0.25) * 0.5)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(autoencoder_folder).decode(z).sample
    assert images.dtype == torch.uint8
    grey = ((expected + 1) * 127.5).clamp(0, 255)
    assert (images.float() - grey).abs().max() <= 0.51
    assert codec(autoencoder_folder).decode(z.bfloat16()).shape == (5, 3, 8, 12)


def test_the_shape_follows_the_autoencoder(autoencoder_folder):
    vae = codec(autoencoder_folder)
    assert vae.shape(3, 8, 12) == (4, 4, 6) == tuple(vae.encode(IMAGES).shape[1:])
    with pytest.raises(ValueError, match=r"^channels=1: the autoencoder of codec\.weights takes 3$"):
        vae.shape(1, 8, 8)
    with pytest.raises(ValueError, match=r"^resolution=9: must be divisible by 2, the factor of the autoencoder$"):
        vae.shape(3, 9, 9)
    with pytest.raises(ValueError, match=r"^resolution=\[8, 9\]: "):
        vae.shape(3, 8, 9)


def test_it_is_no_part_of_a_module_that_holds_it(autoencoder_folder):
    module = torch.nn.Linear(1, 1)
    module.codec = codec(autoencoder_folder)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert len(list(module.parameters())) == 2
    latents = module.codec.encode(IMAGES)
    assert not latents.requires_grad
    assert not module.codec.autoencoder.training
    module.codec.decode(latents)
    assert all(p.grad is None and not p.requires_grad for p in module.codec.autoencoder.parameters())


def test_it_goes_where_its_input_is(autoencoder_folder):
    vae = codec(autoencoder_folder)
    vae.autoencoder.to("meta")
    with pytest.raises(NotImplementedError, match="meta tensor"):  # what moving from there raises
        vae.encode(IMAGES)
    if torch.cuda.is_available():
        vae = codec(autoencoder_folder)
        latents = vae.encode(IMAGES.cuda(), NoiseSource(0, torch.arange(5).cuda()))
        assert latents.device.type == vae.decode(latents).device.type == "cuda"
        torch.testing.assert_close(
            vae.encode(IMAGES, NoiseSource(0, torch.arange(5))), latents.cpu(), atol=1e-3, rtol=0
        )


def test_it_runs_in_float32_under_autocast(autoencoder_folder):
    vae = codec(autoencoder_folder)
    expected = vae.encode(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vae.encode(IMAGES), expected)


def test_weights_are_local_or_one_line(autoencoder_folder, tmp_path):
    def refuses(line, folder):
        with pytest.raises(ValueError, match=line):
            codec(folder)

    refuses(r"^weights=null: give the folder of an autoencoder .+ stabilityai/sd-vae-ft-ema .+$", None)
    refuses(rf"^weights={tmp_path}/no: holds no config\.json; fetch it from .+$", tmp_path / "no")
    folder = shutil.copytree(autoencoder_folder, tmp_path / "copy")
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuses(rf"^weights={folder}: cannot be read \([^\n]+\)$", folder)
    tensors = load_file(autoencoder_folder / weights.name)
    kept = {key: value for key, value in tensors.items() if not key.startswith("decoder.conv_out")}
    save_file(kept, weights)
    refuses(rf"^weights={folder}: {weights.name} is not of its config\.json: decoder\.conv_out\..+ and 1 more$", folder)
    save_file(tensors | {"more": torch.zeros(1)}, weights)
    refuses(r"is not of its config\.json: more and 0 more$", folder)
    save_file(tensors | {"decoder.conv_out.bias": torch.zeros(5)}, weights)
    refuses(rf"^weights={folder}: cannot be read \([^\n]+\)$", folder)
    weights.unlink()
    refuses(rf"^weights={folder}: holds no {weights.name}; ", folder)


def test_the_older_names_of_attention_weights_are_read(autoencoder_folder, tmp_path):
    folder = shutil.copytree(autoencoder_folder, tmp_path / "copy")
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    assert sum(".query." in key for key in tensors) == 4
    save_file(tensors, weights)
    assert torch.equal(codec(folder).encode(IMAGES), codec(autoencoder_folder).encode(IMAGES))


def test_weights_of_other_shapes_are_refused(autoencoder_folder, tmp_path):
    folder = shutil.copytree(autoencoder_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(ValueError, match=r"cannot be read"):
        codec(folder)


def test_without_diffusers_it_says_what_to_install(autoencoder_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"^weights=.+: needs diffusers, pip install diffusers \(.+\)$"):
        codec(autoencoder_folder)


def test_values_out_of_range(autoencoder_folder):
    for key, value, line in [("scale", 0.0, "must be above 0"), ("batch", 0, "must be at least 1")]:
        with pytest.raises(ValueError, match=f"^{key}={value}: {line}$"):
            codec(autoencoder_folder, **{key: value})
