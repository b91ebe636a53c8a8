"""Any network as a feature extractor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from denoiselab.condition import height_width
from denoiselab.evaluation.features import Extractor, Features
from denoiselab.runs.weights import load_weights

OURS = ("digits", "inception", "vgg16", "clip", "dinov2")  # names that stand for published weights


class ModuleExtractor(Extractor):
    """The output of any `nn.Module`.

    In a config, for example:

    ```yaml
    extractors:
      resnet:
        _target_: denoiselab.evaluation.module_extractor.ModuleExtractor
        module: {_target_: torchvision.models.resnet18, _partial_: true}
        name: resnet18_imagenet
        weights: resnet18.pth
        resolution: 224
        channels: 3
        bounds: [0, 1]
        mean: [0.485, 0.456, 0.406]
        std: [0.229, 0.224, 0.225]
    ```

    Its numbers are `fd_<name>_10k` and so on. The hash covers the classes of the module's parts, its weights and what is
    done to the images, but not the module's own code: rename what you change.

    Args:
        module: makes the network, which takes images of shape (N, C, H, W) to features of shape (N, ...), which are
            flattened, or to a tuple of features and logits.
        name: lower-case letters, digits and underscores; stands in the name of every number.
        weights: a .safetensors or torch.save state dict of the module; None leaves what the module begins with, drawn from
            a fixed seed if it is drawn.
        resolution: that images are scaled to, bilinear with antialiasing; None leaves them as they are.
        channels: that the module takes, 1 or 3; grey images stand for RGB ones.
        bounds: what the module takes for black and for white, [0, 1], [-1, 1] or [0, 255] for example; always float32.
        mean: of each channel, subtracted after that; None for none.
        std: of each channel, divided by; None for none.
        num_classes: of the logits, where they are of the data's classes; None: not read as such.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        module: Callable[[], nn.Module],
        name: str,
        weights: str | None = None,
        resolution: int | None = None,
        channels: int = 3,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: list[float] | None = None,
        std: list[float] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(module, nn.Module):
            raise ValueError(
                f"module={type(module).__name__}: must be built late; write _partial_: true beside _target_"
            )
        if not re.fullmatch("[a-z0-9_]+", name) or name.startswith(OURS):
            raise ValueError(f"name={name}: must be of a-z, 0-9 and _, and not begin with {', '.join(OURS)}")
        if resolution is not None and resolution < 1:
            raise ValueError(f"resolution={resolution}: must be at least 1, or null")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: must be 1 (grey) or 3 (RGB)")
        if len(bounds) != 2 or bounds[0] >= bounds[1]:
            raise ValueError(f"bounds={list(bounds)}: must be two numbers, the lower one first")
        for key, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != channels or (key == "std" and min(values) <= 0)):
                raise ValueError(f"{key}={values}: must be {channels} numbers{', above 0' if key == 'std' else ''}")
        self.module, self.name, self.channels, self.num_classes = module, name, channels, num_classes
        self.given = Path(weights) if weights is not None else None
        self.resolution, self.bounds = resolution, (float(bounds[0]), float(bounds[1]))
        self.mean, self.std = mean or [0.0] * channels, std or [1.0] * channels
        size = f"bilinear to {resolution}x{resolution}, antialiased" if resolution else "none"
        self.resize = f"{size}; channels {channels}, bounds {list(self.bounds)}, mean {self.mean}, std {self.std}"

    @property
    def label(self) -> str:
        """See `Extractor.label`."""
        return self.name

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 (hex) over the classes of the module's parts and its tensors' names, types, shapes and numbers."""
        parts = [(name, type(part).__module__, type(part).__qualname__) for name, part in self._network.named_modules()]
        total = hashlib.sha256(repr(parts).encode())
        for key, tensor in sorted(self._network.state_dict().items()):
            total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def check(self, *, channels: int, resolution: int | list[int]) -> None:
        """See `Extractor.check`; the module is built and called once."""
        if channels not in (1, self.channels):
            raise ValueError(f"channels={channels}: the {self.name} extractor takes {self.channels}")
        height, width = height_width(resolution)
        images = torch.zeros(2, channels, height, width, dtype=torch.uint8)
        _ = self._network
        try:
            found = self(images)
        except Exception as error:  # somebody's module
            raise ValueError(
                f"module={self.name}: cannot take images of {height}x{width} ({_one_line(error)})"
            ) from error
        logits = None if found.logits is None else found.logits.shape[1]
        if self.num_classes not in (None, logits):
            raise ValueError(f"num_classes={self.num_classes}: the module gives {logits or 'no'} logits")

    def _build(self) -> nn.Module:
        if self.given is not None and not self.given.is_file():
            raise ValueError(f"weights={self.given}: no such file")
        torch.random.default_generator.manual_seed(0)  # the base gives the generator's state back
        try:
            network = self.module()
        except Exception as error:  # somebody's module
            raise ValueError(f"module={self.name}: cannot be built ({_one_line(error)})") from error
        try:
            if self.given is not None:
                network.load_state_dict(_read(self.given))
        except Exception as error:  # safetensors, torch and pickle raise many kinds
            raise ValueError(
                f"weights={self.given}: must be a state dict of the module ({_one_line(error)})"
            ) from error
        return _Prepared(network, self)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return load_weights(path)


class _Prepared(nn.Module):
    """A module behind the preprocessing that an extractor describes."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, how: ModuleExtractor) -> None:
        super().__init__()
        self.network, self.channels, self.resolution, self.bounds = network, how.channels, how.resolution, how.bounds
        self.register_buffer("mean", torch.tensor(how.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(how.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Features:
        x = images.expand(-1, self.channels, -1, -1).float()  # (N, C, H, W)
        if self.resolution is not None:
            x = interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", antialias=True)
        low, high = self.bounds
        found = self.network((x * ((high - low) / 255) + low - self.mean) / self.std)
        features, *logits = found if isinstance(found, tuple) else (found,)
        return Features(features.flatten(1), *logits)
