from __future__ import annotations

import re

import diffusers
import pytest
import torch
from hydra.utils import instantiate

from denoiselab.diffusion.paths import (
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    RectifiedFlow,
    Shifted,
    Sigmoid,
    Trigonometric,
    VarianceExploding,
    VPLinear,
    ZeroTerminalSNR,
)
from denoiselab.diffusion.prediction import EDM, X0, Epsilon, Score, V, Velocity
from denoiselab.exchange.schedulers import from_scheduler, scheduler_for

TABLES = {
    "linear": DDPMLinear(beta_max=0.01),
    "scaled_linear": DDPMScaledLinear(),
    "squaredcos_cap_v2": DDPMCosine(),
}
OTHERS = [
    Cosine(),
    Sigmoid(),
    Trigonometric(),
    VPLinear(),
    DDPMLinear(t_max=0.9),
    DDPMLinear(steps=4000),
    DDPMCosine(s=0.02),
    ZeroTerminalSNR(path=DDPMScaledLinear()),
]
PREDICTIONS = {"epsilon": Epsilon(), "sample": X0(), "v_prediction": V()}


def tables(path):
    """α² at a thousand equal times, and what the network is told there."""
    t = path.t_max * torch.arange(1, 1001, dtype=torch.float64) / 1000
    return path.alpha(t).square(), path.c_noise(t)


@pytest.mark.parametrize("path", [*TABLES.values(), *OTHERS], ids=lambda path: type(path).__name__)
def test_the_scheduler_has_the_table_of_the_path(path):
    found = scheduler_for(path, V())
    scheduler = getattr(diffusers, found.name)(**found.options)
    alpha_bar, told = tables(path)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.time_scale * torch.arange(1000.0) + found.time_offset, told.float())
    assert found.start == pytest.approx(float(path.sigma(torch.tensor(path.t_max, dtype=torch.float64))))
    assert ("trained_betas" in found.options) == (path in OTHERS)


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        (DDPMLinear(), True),
        (DDPMCosine(), True),
        (ZeroTerminalSNR(path=DDPMScaledLinear()), True),
        (DDPMScaledLinear(), False),  # begins with σ(1) = 0.998 of the noise
        (DDPMLinear(steps=4000), False),  # its network is told a quarter of the step's number
        (Cosine(), False),
    ],
)
def test_whether_diffusers_own_pipeline_would_do(path, plain):
    assert scheduler_for(path, V()).plain is plain


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_a_name_comes_back(name, kind):
    found = scheduler_for(TABLES[name], PREDICTIONS[kind])
    assert (found.options["beta_schedule"], found.options["prediction_type"]) == (name, kind)
    config = diffusers.DDIMScheduler(**found.options).config
    path, prediction = (instantiate(node) for node in from_scheduler({**config, "_class_name": found.name}))
    assert type(prediction) is type(PREDICTIONS[kind])
    assert type(path) is type(TABLES[name])
    for ours, again in zip(tables(TABLES[name]), tables(path), strict=True):
        torch.testing.assert_close(again, ours, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_comes_back():
    path, _ = from_scheduler(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    )
    assert float(instantiate(path).alpha(torch.tensor(1.0, dtype=torch.float64))) == 0


@pytest.mark.parametrize("heun", [False, True])
def test_rectified_flow(heun):
    found = scheduler_for(RectifiedFlow(), Velocity(), heun=heun)
    name = "FlowMatchHeunDiscreteScheduler" if heun else "FlowMatchEulerDiscreteScheduler"
    assert (found.name, found.time_scale, found.time_offset, found.start) == (name, 1.0, 0.0, 1.0)
    config = getattr(diffusers, name)(**found.options).config
    for there in ({**config, "_class_name": name}, {"_class_name": "DPMSolver", "use_flow_sigmas": True}):
        path, prediction = (instantiate(node) for node in from_scheduler(there))
        assert (type(path), type(prediction)) == (RectifiedFlow, Velocity)


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        (VarianceExploding(), EDM()),
        (DDPMLinear(), EDM()),
        (DDPMLinear(), Score()),
        (DDPMLinear(), Velocity()),
        (RectifiedFlow(), V()),
        (RectifiedFlow(), X0()),
        (Shifted(path=RectifiedFlow(), shift=3.0), Velocity()),
    ],
)
def test_what_diffusers_has_no_scheduler_for(path, prediction):
    with pytest.raises(
        ValueError, match=rf"^objective: .* {prediction.name} on {type(path).__name__}; it has epsilon, x0"
    ):
        scheduler_for(path, prediction)


def test_a_network_that_is_told_something_else():
    with pytest.raises(
        ValueError, match=r"^objective.path=Shifted: what its network is told is no function of a timestep"
    ):
        scheduler_for(Shifted(path=Cosine(), shift=2.0), V())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: must be linear, scaled_linear or squaredcos_cap_v2"),
        ({"_class_name": "EDMEulerScheduler"}, "beta_schedule=None: must be linear"),
        ({"beta_schedule": "linear", "beta_start": {"_target_": "a.b"}}, "beta_start={'_target_': 'a.b'}: must be a"),
        ({"beta_schedule": "linear", "beta_end": "0.02"}, "beta_end=0.02: must be a number"),
        ({"beta_schedule": "linear", "prediction_type": ["epsilon"]}, "prediction_type=['epsilon']: must be epsilon"),
        ({"beta_schedule": "linear", "num_train_timesteps": 4000}, "num_train_timesteps=4000: must be 1000"),
        ({"beta_schedule": "linear", "trained_betas": [0.1]}, "trained_betas: is a table without a name"),
        (
            {"beta_schedule": "linear", "prediction_type": "flow"},
            "prediction_type=flow: must be epsilon, sample, v_prediction",
        ),
    ],
)
def test_a_scheduler_that_is_no_path_of_ours(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_scheduler(config)
