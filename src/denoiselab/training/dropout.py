"""Dropout whose masks are a function of (seed, layer, step, place in the global batch).

torch's layers draw from the generator of their process: what they drop depends on which rank and which micro-batch a sample
is in. Here each layer asks the counter of `denoiselab.diffusion.noise` with its own name as the purpose, so that one rank
of eight samples, two of four and two micro-batches of four drop the same numbers. No state is consumed: activation
checkpointing draws a mask again by asking again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from denoiselab.diffusion.noise import bits16, key_of

LEVELS = 2**16
WHOLE_CHANNELS = {nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True}


class Places:
    """Which samples the network sees just now, and at which step; the dropout layers of a network share one."""

    def __init__(self) -> None:
        self.place = torch.zeros(0, dtype=torch.int64)
        self.step = torch.zeros((), dtype=torch.int64)

    def set(self, place: Tensor, step: int) -> None:
        """Say it, before each micro-batch.

        Args:
            place: (B,) int64, places in the global batch.
            step: the global step.
        """
        self.place, self.step = place, torch.full((), step, device=place.device)  # filled there: no copy to wait for


class KeyedDropout(nn.Module):
    """Takes the place of torch's layer: in training an element is 0 with probability p, and scaled by 1/(1 − p) otherwise.

    p is rounded to a multiple of 1/65536, and 1/(1 − p) is of the rounded one, so that expectations are exact. The first
    dimension of the input must be the samples. A layer that is called twice in a forward pass drops the same both times.

    Args:
        p: probability, in (0, 1).
        whole_channels: whether an element is a whole channel of (B, C, …).
        seed: of the run.
        name: of the layer in its network.
        places: what `Places.set` is called on.
    """

    def __init__(self, *, p: float, whole_channels: bool, seed: int, name: str, places: Places) -> None:
        super().__init__()
        self.dropped = min(round(p * LEVELS), LEVELS - 1)
        self.whole_channels, self.name, self.places = whole_channels, name, places
        self.key = key_of(seed, f"dropout {name}")

    def forward(self, x: Tensor) -> Tensor:
        """What is left of x, of the same shape and type."""
        if not self.training or not self.dropped:
            return x
        place = self.places.place
        assert len(x) == len(place), f"{self.name}: {len(x)} rows of {len(place)} samples; see Places.set"
        shape = x.shape[:2] + (1,) * (x.ndim - 2) if self.whole_channels else x.shape
        drawn = bits16(shape[1:].numel(), place, self.places.step, self.key)
        kept = (drawn >= self.dropped - LEVELS // 2).view(shape)
        return torch.where(kept, x * (LEVELS / (LEVELS - self.dropped)), 0.0)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.dropped / LEVELS:g}"


def key_dropout(network: nn.Module, seed: int) -> Places:
    """Put a `KeyedDropout` in the place of each dropout layer of a network, before it is first called.

    What draws in other ways (`torch.nn.functional.dropout`, the dropout of attention) is not seen: it would go on drawing
    from the process's generator.

    Args:
        network: changed in place; its parameters and their names stay.
        seed: of the run.

    Returns:
        Where to say which samples the network sees.

    Raises:
        ValueError: if the network has a kind of dropout that is not keyed, such as `AlphaDropout`.
    """
    places, new = Places(), {}
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(layer, _DropoutNd) or layer.p == 0:
            continue
        if type(layer) not in WHOLE_CHANNELS or layer.p == 1:
            raise ValueError(f"{name}={layer}: must be Dropout, Dropout1d, 2d or 3d with p below 1")
        if layer not in new:
            new[layer] = KeyedDropout(
                p=layer.p, whole_channels=WHOLE_CHANNELS[type(layer)], seed=seed, name=name, places=places
            ).train(layer.training)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, new[layer])
    return places
