"""Bits per dimension of real images under a model, beside the numbers of its samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.likelihood import bits_per_dim
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.evaluation.records import Number, count_name
from denoiselab.evaluation.reference import Data


class BitsPerDim:
    """The mean bits per dimension of the first test images.

    Args:
        images: how many, at least 2.
        steps: of the solver, four network evaluations each.
        probes: of Hutchinson's estimate per image.
        batch_size: images per network call.
        seed: of dequantisation and probes.
    """

    def __init__(
        self, *, images: int = 500, steps: int = 50, probes: int = 1, batch_size: int = 250, seed: int = 0
    ) -> None:
        lowest = {"images": 2, "steps": 1, "probes": 1, "batch_size": 1, "seed": 0}
        for name, value in zip(lowest, (images, steps, probes, batch_size, seed), strict=True):
            if value < lowest[name]:
                raise ValueError(f"{name}={value}: must be at least {lowest[name]}")
        self.images, self.steps, self.probes, self.batch_size, self.seed = images, steps, probes, batch_size, seed

    def measure(
        self, denoiser: Denoiser, codec: Any, data: Data, device: torch.device, protocol: dict[str, Any]
    ) -> Number:
        """The number, with its standard error over the images in the protocol."""
        test, values = data.test_set(), list[Tensor]()
        count = min(self.images, len(test))
        for start in range(0, count, self.batch_size):
            index = torch.arange(start, min(start + self.batch_size, count))
            x0 = codec.encode(torch.stack([test.image(i) for i in index.tolist()]).to(device))
            label = torch.tensor([test.label(i) for i in index.tolist()], device=device) if data.num_classes else None
            noise = NoiseSource(seed=self.seed, index=index.to(device))
            found = bits_per_dim(denoiser, x0, Condition(label=label), noise, steps=self.steps, probes=self.probes)
            values.append(found.value.cpu())
        bits = torch.cat(values)
        record = {"steps": self.steps, "probes": self.probes, "dequantisation": "uniform", "seed": self.seed}
        record |= {"split": "test", "count": count, "fingerprint": data.fingerprint("test")}
        record |= {"standard_error": (bits.std() / count**0.5).item()}
        return Number(f"bits_per_dim_{count_name(count)}", bits.mean().item(), None, protocol | record)
