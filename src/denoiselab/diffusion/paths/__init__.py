"""Gaussian paths from data to noise: x_t = α(t)·x0 + σ(t)·ε.

A path owns α, σ, their derivatives in its own time t, the log-SNR λ(t) = ln(α²/σ²) and its inverse. t runs from `t_min`
(data end, σ > 0) to `t_max` (noise end). Everything is evaluated in the type of t; callers pass float64 and round the
result, because 1 − ᾱ near the data end has no digits left in float32.

Variance preserving paths (α² + σ² = 1) follow from λ alone:

    α² = sigmoid(λ),  σ² = sigmoid(−λ),  α̇ = α·σ²·λ̇/2,  σ̇ = −σ·α²·λ̇/2

so `VariancePreserving` asks its subclasses for λ, λ̇ and the inverse of λ only.
"""

from denoiselab.diffusion.paths.base import Coefficients, Path, Time, VariancePreserving
from denoiselab.diffusion.paths.continuous import (
    Cosine,
    Laplace,
    RectifiedFlow,
    Sigmoid,
    Trigonometric,
    VarianceExploding,
    VPLinear,
)
from denoiselab.diffusion.paths.discrete import BetaTable, DDPMCosine, DDPMLinear, DDPMScaledLinear
from denoiselab.diffusion.paths.wrappers import Shifted, ZeroTerminalSNR, resolution_shifted

__all__ = [
    "BetaTable",
    "Coefficients",
    "Cosine",
    "DDPMCosine",
    "DDPMLinear",
    "DDPMScaledLinear",
    "Laplace",
    "Path",
    "RectifiedFlow",
    "Shifted",
    "Sigmoid",
    "Time",
    "Trigonometric",
    "VPLinear",
    "VarianceExploding",
    "VariancePreserving",
    "ZeroTerminalSNR",
    "resolution_shifted",
]
