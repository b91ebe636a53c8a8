"""Samplers: from noise to data by asking a denoiser. The mathematics is in `base.py`."""

from denoiselab.diffusion.samplers.adaptive import DormandPrince
from denoiselab.diffusion.samplers.base import CLEAN, Ask, History, Normal, Point, Sampler, Visit, points_of
from denoiselab.diffusion.samplers.multistep import Adams, DPMSolverPP
from denoiselab.diffusion.samplers.single_step import (
    DDIM,
    DDPM,
    DPMSolverPP2S,
    Euler,
    EulerT,
    Heun,
    HeunT,
    Midpoint,
    RungeKutta4,
    StochasticHeun,
)

__all__ = [
    "CLEAN",
    "DDIM",
    "DDPM",
    "Adams",
    "Ask",
    "DPMSolverPP",
    "DPMSolverPP2S",
    "DormandPrince",
    "Euler",
    "EulerT",
    "Heun",
    "HeunT",
    "History",
    "Midpoint",
    "Normal",
    "Point",
    "RungeKutta4",
    "Sampler",
    "StochasticHeun",
    "Visit",
    "points_of",
]
