"""Exponential moving averages of the weights, in float32, updated once per optimizer step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RAW = "raw"
MOST = 64  # averages
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


def check_name(name: str, given: str) -> None:
    """See to it that an average's name, which becomes part of file names, is fit for that.

    Args:
        name: of the average.
        given: where it stands, for the message.

    Raises:
        ValueError: if it is not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{given}: the name must be 1 to 64 letters, digits or _.+- and begin with a letter or digit")


class EMA:
    """One or several named averages of a network's parameters.

    After update n (from 0) an average is ema ← d·ema + (1 − d)·weights. With warm-up d = min(decay, (1 + n)/(10 + n)), so
    that a short run is not averaged with its initial weights (as TensorFlow's ExponentialMovingAverage does). With a
    ramp-up r the half-life is at most the share r of the updates so far, d ≤ ½^(1/(r·n)), as in EDM.

    Args:
        decays: name → decay in [0, 1), at most 64. The first one is used for validation, sampling and metrics unless another
            is asked for; none means the raw weights are.
        warmup: whether d starts small.
        ramp_up: r, positive; None does not bound the half-life.

    Raises:
        ValueError: if a number is out of range, there are too many, or a name is "raw" (which names the weights themselves).
    """

    def __init__(self, *, decays: dict[str, float], warmup: bool = True, ramp_up: float | None = None) -> None:
        if len(decays) > MOST:
            raise ValueError(
                f"decays: must be at most {MOST} averages, not {len(decays)}; each is as large as the network"
            )
        for name, decay in decays.items():
            check_name(name, f"decays.{name}={decay}")
            if not 0 <= decay < 1:
                raise ValueError(f"decays.{name}={decay}: must be in [0, 1)")
        if RAW in decays:
            raise ValueError(f"decays.raw={decays[RAW]}: the name raw is taken by the weights themselves")
        if ramp_up is not None and not ramp_up > 0:
            raise ValueError(f"ramp_up={ramp_up}: must be positive, or null")
        self.decays, self.warmup, self.ramp_up = dict(decays), warmup, ramp_up
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
    def update(self, network: nn.Module, ok: Tensor | None = None) -> None:
        """Move every average towards the weights; call it once after each optimizer step.

        Args:
            network: whose weights.
            ok: whether the step counted, bool of shape () on the weights' device, where it is read: averages stay as they
                are after one that did not. `updates` counts it all the same. None: it did.
        """
        assert not self._raw, "the network holds an average, not the weights"
        weights = [p.detach().float() for p in network.parameters()]
        for name, decay in self.decays.items():
            self._to(name, weights[0].device)
            share = torch.full((), 1 - self.bounded(decay), device=weights[0].device)
            if ok is not None:
                share = share * ok
            torch._foreach_lerp_(list(self.averages[name].values()), weights, [share] * len(weights))
        self.updates += 1

    def bounded(self, decay: float) -> float:
        """The d of the next update for an average of this decay."""
        n = self.updates
        if self.warmup:
            decay = min(decay, (1 + n) / (10 + n))
        if self.ramp_up is not None:
            decay = min(decay, 0.5 ** (1 / (self.ramp_up * n)) if n else 0.0)
        return decay

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


def half_life_ema(*, half_lives: dict[str, float], batch_size: int, ramp_up: float | None = 0.05) -> EMA:
    """Averages given by their half-lives in images, so that they mean the same at every batch size: d = ½^(batch/half-life).

    Args:
        half_lives: name → half-life in thousands of images, positive.
        batch_size: images per update.
        ramp_up: the largest half-life as a share of the images so far, positive; None does not bound it.

    Raises:
        ValueError: if a number is out of range.

    Source: EDM's training loop (Karras et al. 2022), 500 thousand images with a ramp-up of 0.05.
    """
    for name, half_life in half_lives.items():
        check_name(name, f"half_lives.{name}={half_life}")
        if not half_life > 0:
            raise ValueError(f"half_lives.{name}={half_life}: must be positive")
    decays = {name: 0.5 ** (batch_size / (1000 * half_life)) for name, half_life in half_lives.items()}
    return EMA(decays=decays, warmup=False, ramp_up=ramp_up)
