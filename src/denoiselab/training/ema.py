"""Exponential moving averages of the weights, in float32, updated once per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RAW = "raw"


class EMA:
    """One or several named averages of a network's parameters.

    After update n (from 0) an average is ema ← d·ema + (1 − d)·weights. With warm-up d = min(decay, (1 + n)/(10 + n)), so
    that a short run is not averaged with its initial weights (as TensorFlow's ExponentialMovingAverage does).

    Args:
        decays: name → decay in [0, 1). The first one is used for validation, sampling and metrics unless another is asked
            for; none means the raw weights are.
        warmup: whether d starts small.

    Raises:
        ValueError: if a decay is out of range, or a name is "raw" (which names the weights themselves).
    """

    def __init__(self, *, decays: dict[str, float], warmup: bool = True) -> None:
        for name, decay in decays.items():
            if not 0 <= decay < 1:
                raise ValueError(f"decays.{name}={decay}: must be in [0, 1)")
        if RAW in decays:
            raise ValueError(f"decays.raw={decays[RAW]}: the name raw is taken by the weights themselves")
        self.decays, self.warmup = dict(decays), warmup
        self.updates = 0
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._raw: dict[str, Tensor] = {}  # the raw weights, while an average is in the network

    @property
    def default(self) -> str:
        """The weights that are used unless others are asked for."""
        return next(iter(self.decays), RAW)

    @property
    def names(self) -> list[str]:
        """All weights that can be asked for: the averages and "raw"."""
        return [*self.decays, RAW]

    def start(self, network: nn.Module) -> None:
        """Set every average to the network's weights."""
        self.updates = 0
        self.averages = {
            name: {key: p.detach().to(torch.float32, copy=True) for key, p in network.named_parameters()}
            for name in self.decays
        }

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move every average towards the weights; call it once after each optimizer step."""
        assert not self._raw, "the network holds an average, not the weights"
        weights = [p.detach().float() for p in network.parameters()]
        for name, decay in self.decays.items():
            self._to(name, weights[0].device)
            if self.warmup:
                decay = min(decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(list(self.averages[name].values()), weights, 1 - decay)
        self.updates += 1

    def _to(self, name: str, device: torch.device) -> None:
        average = self.averages[name]
        if average and next(iter(average.values())).device != device:
            self.averages[name] = {key: value.to(device) for key, value in average.items()}

    @contextmanager
    def applied(self, network: nn.Module, name: str) -> Iterator[None]:
        """Within the context the network holds the weights `name`; afterwards its own again, whatever happened.

        Raises:
            ValueError: if there are no such weights.
        """
        assert not self._raw, "the network already holds an average"
        if name == RAW:
            yield
            return
        if name not in self.averages:
            raise ValueError(f"weights={name}: must be one of {', '.join(self.names)}")
        parameters = dict(network.named_parameters())
        self._to(name, next(iter(parameters.values())).device)
        self._raw = {key: p.data for key, p in parameters.items()}
        try:
            for key, p in parameters.items():
                p.data = self.averages[name][key].to(p.dtype)
            yield
        finally:
            for key, p in parameters.items():
                p.data = self._raw[key]
            self._raw = {}

    def raw(self, key: str, value: Tensor) -> Tensor:
        """The raw weight `key`, also while an average is in the network and `value` is the average's."""
        return self._raw.get(key, value)

    def state_dict(self) -> dict[str, Any]:
        """{"averages": {name: {key: tensor}}, "updates": n}."""
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over averages of the same names.

        Raises:
            ValueError: if one is missing.
        """
        missing = set(self.decays) - set(state["averages"])
        if missing:
            raise ValueError(f"ema: the checkpoint has no {', '.join(sorted(missing))}")
        self.averages = {name: dict(state["averages"][name]) for name in self.decays}
        self.updates = state["updates"]
