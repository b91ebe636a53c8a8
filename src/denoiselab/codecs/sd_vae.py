"""Latents of Stable Diffusion's autoencoder (Rombach et al. 2022), the space of DiT and SiT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Noise(Protocol):
    """Where the randomness of a batch of B samples comes from: a `NoiseSource`, for example."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, of shape (B, *shape)."""
        ...


class SDVAE:
    """The codec of latent-space models: x = (z − shift)·scale, where z is what diffusers' AutoencoderKL makes of an image.

    The autoencoder is no module of the network that is trained: it is in no checkpoint, takes no gradient, runs in float32
    and follows its input to another device.

    Args:
        weights: a folder with the autoencoder in diffusers' layout (config.json, diffusion_pytorch_model.safetensors).
        scale: makes the latents' standard deviation about 1; 0.18215 for Stable Diffusion 1 and 2 and their fine-tuned
            decoders, which DiT and SiT use.
        shift: of the latents before scaling; 0 for these.
        batch: images that go through the autoencoder at a time, at least 1.

    Raises:
        ValueError: if a value is out of its range, or there is no such autoencoder.
    """

    def __init__(self, *, weights: str | None, scale: float, shift: float, batch: int) -> None:
        if scale <= 0:
            raise ValueError(f"scale={scale}: must be above 0")
        if batch < 1:
            raise ValueError(f"batch={batch}: must be at least 1")
        self.scale, self.shift, self.batch = scale, shift, batch
        self.autoencoder = load_autoencoder(weights)
        self.factor: int = 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of this shape: of Stable Diffusion's, 4 channels of an eighth of the sides.

        Raises:
            ValueError: if the autoencoder takes no such images.
        """
        config, factor = self.autoencoder.config, self.factor
        if channels != config.in_channels:
            raise ValueError(f"channels={channels}: the autoencoder of codec.weights takes {config.in_channels}")
        if height % factor or width % factor:
            sides = height if height == width else [height, width]
            raise ValueError(f"resolution={sides}: must be divisible by {factor}, the factor of the autoencoder")
        return config.latent_channels, height // factor, width // factor

    def encode(self, images: UInt8[Tensor, "B C H W"], noise: Noise | None = None) -> Float[Tensor, "B c h w"]:
        """The latents of images, float32.

        Args:
            images: 0 … 255.
            noise: of these samples, to draw from the posterior, as training does; None takes its mean.
        """
        moments = self._pass(lambda x: self.autoencoder.encode(x).latent_dist.parameters, images.float() / 127.5 - 1)
        mean, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise.normal("posterior", mean.shape[1:])
        return (mean - self.shift) * self.scale

    def decode(self, x: Float[Tensor, "B c h w"]) -> UInt8[Tensor, "B C H W"]:
        """The images of latents, to the nearest grey levels."""
        images = self._pass(lambda z: self.autoencoder.decode(z).sample, x.float() / self.scale + self.shift)
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _pass(self, through: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Some at a time through the autoencoder, which goes where x is."""
        self.autoencoder.to(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return torch.cat([through(part) for part in x.split(self.batch)])


def load_autoencoder(weights: str | None) -> Any:
    """The AutoencoderKL of a local folder; nothing is fetched.

    Raises:
        ValueError: in one line, if it is not there, is broken, or diffusers is not installed.
    """
    if weights is None:
        raise ValueError(
            "weights=null: give the folder of an autoencoder in diffusers' layout, for example of stabilityai/sd-vae-ft-ema "
            f"on the Hugging Face hub ({', '.join(FILES)})"
        )
    for name in FILES:
        if not Path(weights, name).is_file():
            raise ValueError(
                f"weights={weights}: holds no {name}; fetch it from stabilityai/sd-vae-ft-ema, for example"
            )
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"weights={weights}: needs diffusers, pip install diffusers ({error})") from error
    try:
        autoencoder, found = AutoencoderKL.from_pretrained(
            weights, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers, safetensors and json raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"weights={weights}: cannot be read ({reason})") from error
    misfits = [*found["missing_keys"], *found["unexpected_keys"]]  # diffusers only warns, and leaves weights random
    if misfits:
        raise ValueError(
            f"weights={weights}: {FILES[1]} is not of its config.json: {misfits[0]} and {len(misfits) - 1} more"
        )
    return autoencoder.float().eval().requires_grad_(False)
