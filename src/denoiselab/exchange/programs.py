"""The denoiser as a program that runs without this package: torch.export and TorchScript.

Both take x (float32, shape (B, C, H, W)), t (float64, shape (B,), in the path's own time) and, where there are classes, label
(int64, shape (B,), −1 for no class), and give x0, for any B ≥ 1.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser, per_sample

TOLERANCE = 1e-4  # of the largest entry


class DenoiserProgram(nn.Module):
    """(x, t) or (x, t, label) to x0: `NetworkDenoiser` with nothing in it that fixes the number of samples.

    Args:
        denoiser: the denoiser of a network that is an `nn.Module`.
        labelled: whether it takes labels.
    """

    def __init__(self, *, denoiser: NetworkDenoiser, labelled: bool) -> None:
        super().__init__()
        assert isinstance(denoiser.network, nn.Module)
        self.network, self.denoiser, self.labelled = denoiser.network, denoiser, labelled

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The denoiser's x0."""
        path, prediction = self.denoiser.path, self.denoiser.prediction
        width = getattr(self.network, "augment_dim", 0)
        condition = Condition(label=label, augment=x.new_zeros(x.shape[0], width) if width else None)
        pair, c_in = prediction.pair(path, t), prediction.c_in(path.coefficients(t))
        output = self.network(per_sample(c_in, x) * x, prediction.c_noise(path, t).float(), condition)
        output = output[:, : x.shape[1]]  # without a learned variance
        return per_sample(pair.b / pair.det, x) * x - per_sample(pair.sigma / pair.det, x) * output

    def examples(self, count: int, shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """Arguments for `count` samples, the same at each call."""
        generator = torch.Generator().manual_seed(count)
        path = self.denoiser.path
        x = torch.randn(count, *shape, generator=generator)
        t = torch.linspace(path.t_min, path.t_max, count + 2, dtype=torch.float64)[1:-1]
        label = torch.arange(count) - 1  # −1, the null label, among them
        return (x, t, label.clamp(max=0)) if self.labelled else (x, t)


def save_torch_export(program: DenoiserProgram, shape: tuple[int, int, int], path: Path) -> Callable[..., Tensor]:
    """Write a .pt2 of `torch.export`, read it again and return it.

    Raises:
        ValueError: if the path decides in Python what to compute, as the search of a shifted table does.
    """
    batch = torch.export.Dim("batch", min=1)
    arguments = program.examples(2, shape)
    logging.disable(logging.WARNING)  # it logs whole graphs
    try:
        with torch.no_grad():
            exported = torch.export.export(program, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        path_of = type(program.denoiser.path).__name__
        raise ValueError(f"torch.export cannot follow this network on the path {path_of} ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)
    torch.export.save(exported, path)
    return torch.export.load(path).module()


def save_torchscript(program: DenoiserProgram, shape: tuple[int, int, int], path: Path) -> Callable[..., Tensor]:
    """Write a traced TorchScript program, read it again and return it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the tracer, on what it takes for constants, and of torch, on TorchScript's age
        traced = torch.jit.trace(program, program.examples(2, shape), check_trace=False)
        torch.jit.save(traced, str(path))
        return torch.jit.load(str(path))


def difference(program: DenoiserProgram, saved: Callable[..., Tensor], shape: tuple[int, int, int]) -> float:
    """The largest difference of a saved program from the denoiser, at batches of 1 and 3, as a part of the largest entry."""
    worst = 0.0
    for count in (1, 3):
        arguments = program.examples(count, shape)
        with torch.no_grad():
            x, t, *label = arguments
            want = program.denoiser(x, t, Condition(*label)).x0
            got = saved(*arguments)
        worst = max(worst, float((got - want).abs().max() / want.abs().max().clamp(min=1e-12)))
    return worst
