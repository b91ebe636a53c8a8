"""A diffusers pipeline for what its own pipelines leave out: class labels, flow matching, transformers on pixels.

Written by denoiselab beside the weights; it needs torch and diffusers only. Load it with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


class DenoiselabPipeline(DiffusionPipeline):
    """Noise to images in [-1, 1], without an autoencoder.

    Args:
        scheduler: DDIM, or Euler or Heun of flow matching.
        unet: the network, or
        transformer: the network.
        num_classes: number of classes; the label after the last one, or -1, means "no class". 0: takes no labels.
        time_scale: the network is told time_scale * timestep + time_offset.
        time_offset: as above.
        start: standard deviation of the noise that sampling starts from.
        frequency_shift: of the transformer's time embedding: 0 is DiT's own, diffusers has 1.
        num_inference_steps: how many steps are taken unless the call says otherwise.
    """

    _optional_components: ClassVar[list[str]] = ["unet", "transformer"]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | None = None,
        num_classes: int = 0,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        start: float = 1.0,
        frequency_shift: int = 0,
        num_inference_steps: int = 20,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)
        self.register_to_config(
            num_classes=num_classes,
            time_scale=time_scale,
            time_offset=time_offset,
            start=start,
            frequency_shift=frequency_shift,
            num_inference_steps=num_inference_steps,
        )
        for block in transformer.transformer_blocks if transformer is not None else ():
            block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: how many, where neither labels nor latents say it.
            class_labels: one for each image; None draws without a class.
            num_inference_steps: steps; with DDIM a divisor of 1000 hits the times of denoiselab's uniform grid.
            guidance_scale: of classifier-free guidance; 1 is the conditional model as it is.
            latents: standard normal noise to start from, of shape (B, C, H, W).
            generator: draws it otherwise.
            output_type: "pil", "np" or "pt" for images in [0, 1]; "latent" for what was drawn, unclipped.
            return_dict: whether to return an `ImagePipelineOutput`, else a tuple.
        """
        network = self.unet if self.unet is not None else self.transformer
        size, channels = network.config.sample_size, network.config.in_channels
        if latents is None:
            count = batch_size if class_labels is None else len(class_labels)
            shape = (count, channels, *((size, size) if isinstance(size, int) else size))
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=network.dtype)
        x = self.config.start * latents.to(self._execution_device, network.dtype)
        null = torch.full((len(x),), self.config.num_classes, device=x.device)
        labels = null if class_labels is None else torch.as_tensor(class_labels, device=x.device)
        labels = torch.where(labels < 0, null, labels)

        self._set_timesteps(num_inference_steps or self.config.num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            if guidance_scale == 1:
                output = self._ask(network, x, t, labels)
            else:
                both = self._ask(network, torch.cat([x, x]), t, torch.cat([labels, null]))
                given, without = both.chunk(2)
                output = without + guidance_scale * (given - without)
            x = self.scheduler.step(output, t, x, generator=generator).prev_sample

        images = x if output_type == "latent" else (x / 2 + 0.5).clamp(0, 1)
        if output_type not in ("pt", "latent"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _ask(self, network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The network's prediction, without the channels of a learned variance."""
        time = (self.config.time_scale * t + self.config.time_offset).to(x.device, torch.float32).expand(len(x))
        takes_labels = self.config.num_classes > 0 or network is self.transformer
        return network(x, time, class_labels=labels if takes_labels else None).sample[:, : x.shape[1]]

    def _set_timesteps(self, steps: int) -> None:
        if "FlowMatch" in type(self.scheduler).__name__:  # equal steps down to the clean image
            self.scheduler.sigma_max, self.scheduler.sigma_min = self.config.start, self.config.start / steps
        self.scheduler.set_timesteps(steps)
