"""Our paths and predictions, and the configs of diffusers' schedulers.

A diffusers scheduler of the DDPM family is a table of T betas and a prediction type; its timestep i is what the network is
told. A variance preserving path is such a table at t_max·(i + 1)/T. Its flow-matching schedulers are the straight path, with
timestep 1000·σ. What our network is told must be an affine function of their timestep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoiselab.diffusion.paths import Path
from denoiselab.diffusion.prediction import X0, Epsilon, Prediction, V, Velocity

STEPS = 1000
PREDICTIONS: dict[type[Prediction], str] = {Epsilon: "epsilon", X0: "sample", V: "v_prediction"}
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


@dataclass(frozen=True)
class Scheduler:
    """A diffusers scheduler that stands for a path and a prediction.

    Args:
        name: its class.
        options: its arguments.
        time_scale: the network is told time_scale·timestep + time_offset.
        time_offset: as above.
        start: σ at the noise end, by which the first noise is scaled.
    """

    name: str
    options: dict[str, Any]
    time_scale: float
    time_offset: float
    start: float

    @property
    def plain(self) -> bool:
        """Whether the network is told the timestep itself and the noise is not scaled, as in diffusers' own pipelines."""
        return (self.time_scale, self.time_offset) == (1.0, 0.0) and abs(self.start - 1) < 1e-4


def scheduler_for(path: Path, prediction: Prediction, *, heun: bool = False) -> Scheduler:
    """The scheduler of a path and a prediction.

    Args:
        path: variance preserving, or the straight path.
        prediction: ε, x0 or v on the former, the velocity on the latter.
        heun: whether the flow-matching scheduler shall be Heun's instead of Euler's.

    Raises:
        ValueError: if there is none, in one line that says what there is.
    """
    i = torch.arange(STEPS, dtype=torch.float64)
    t = path.t_max * (i + 1) / STEPS
    c = path.coefficients(t)
    flow = _same(c.alpha, 1 - t) and _same(c.sigma, t)
    if flow and isinstance(prediction, Velocity):
        name = FLOW_SCHEDULERS[heun]
        options: dict[str, Any] = {"num_train_timesteps": STEPS, "shift": 1.0}
    elif _same(c.alpha**2 + c.sigma**2, torch.ones_like(t)) and type(prediction) in PREDICTIONS:
        name = "DDIMScheduler"
        options = _betas(c.alpha**2) | {
            "num_train_timesteps": STEPS,
            "prediction_type": PREDICTIONS[type(prediction)],
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
        }
    else:
        raise ValueError(
            f"objective: diffusers has no scheduler for {prediction.name} on {type(path).__name__}; it has epsilon, x0 and v "
            "on variance preserving paths, and velocity on rectified flow"
        )
    timestep, told = (STEPS * t if flow else i), prediction.c_noise(path, t)
    scale = float((told[-1] - told[0]) / (timestep[-1] - timestep[0]))
    offset = float(told[0] - scale * timestep[0])
    if not _same(told, scale * timestep + offset, atol=1e-3):
        raise ValueError(f"objective.path={type(path).__name__}: what its network is told is no function of a timestep")
    return Scheduler(name, options, round(scale, 9), round(offset, 9), float(c.sigma[-1]))


def _betas(alpha_bar: Tensor) -> dict[str, Any]:
    """A table of betas, by its name where it has one."""
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    betas = 1 - alpha_bar / before
    start, end = round(float(betas[0]), 12), round(float(betas[-1]), 12)
    fractions = torch.linspace(0, 1, len(betas), dtype=torch.float64)
    if _same(betas, start + (end - start) * fractions):
        return {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
    if _same(betas.sqrt(), start**0.5 + (end**0.5 - start**0.5) * fractions):
        return {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
    u = (torch.arange(len(betas) + 1, dtype=torch.float64) / len(betas) + 0.008) / 1.008 * math.pi / 2
    if _same(betas, (1 - (u[1:].cos() / u[:-1].cos()) ** 2).clamp(max=0.999)):
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": betas.tolist()}


def _same(a: Tensor, b: Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


def sampling_notes(config: dict[str, Any]) -> tuple[str, ...]:
    """What a scheduler does in sampling that an import does not carry over."""
    shift = config.get("shift", 1.0)
    said = {
        "x0 was clipped in sampling: guidance=dynamic_threshold guidance.percentile=1e-6": config.get("clip_sample"),
        "x0 was thresholded in sampling: guidance=dynamic_threshold": config.get("thresholding"),
        f"times were shifted in sampling: sampler/grid=shifted sampler.grid.shift={shift}": shift not in (None, 1.0),
    }
    return tuple(note for note, here in said.items() if here)


def from_scheduler(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our path and prediction, as config nodes, for a scheduler_config.json.

    Raises:
        ValueError: naming what has no counterpart.
    """
    name = config.get("_class_name")
    if name in FLOW_SCHEDULERS or config.get("use_flow_sigmas"):
        return _node("paths.RectifiedFlow", t_min=1e-3, t_max=1.0), _node("prediction.Velocity")
    steps = config.get("num_train_timesteps", STEPS)
    if steps != STEPS:
        raise ValueError(f"num_train_timesteps={steps}: must be {STEPS}")
    if config.get("trained_betas") is not None:
        raise ValueError("trained_betas: is a table without a name; say which path it is")
    schedule = config.get("beta_schedule")
    ends = {"beta_min": config.get("beta_start", 1e-4), "beta_max": config.get("beta_end", 0.02)}
    for key, value in ends.items():
        if type(value) not in (int, float):  # a foreign file must not name anything to be built
            raise ValueError(f"{key.replace('min', 'start').replace('max', 'end')}={value}: must be a number")
    table: dict[str, Any] = {"steps": STEPS, "t_min": None, "t_max": 1.0}
    if schedule == "linear":
        path = _node("paths.DDPMLinear", **ends, **table)
    elif schedule == "scaled_linear":
        path = _node("paths.DDPMScaledLinear", **ends, **table)
    elif schedule == "squaredcos_cap_v2":
        path = _node("paths.DDPMCosine", s=0.008, **table)
    else:
        raise ValueError(f"beta_schedule={schedule}: must be linear, scaled_linear or squaredcos_cap_v2")
    if config.get("rescale_betas_zero_snr"):
        path = _node("paths.ZeroTerminalSNR", path=path, t_min=None, t_max=None)
    kind = config.get("prediction_type", "epsilon")
    classes = {theirs: ours.__name__ for ours, theirs in PREDICTIONS.items()}
    if kind not in list(classes):  # which compares and does not hash what a file holds
        raise ValueError(f"prediction_type={kind}: must be {', '.join(classes)}")
    return path, _node(f"prediction.{classes[kind]}")


def _node(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"denoiselab.diffusion.{target}", **arguments}
