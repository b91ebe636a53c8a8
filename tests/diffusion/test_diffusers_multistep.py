"""Our multistep samplers take the steps of diffusers' schedulers, given the same times, noise and network (`parity.py`)."""

from functools import partial

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from parity import (
    GRID,
    NOISE,
    PATH,
    PREDICTIONS,
    SHAPE,
    START,
    assert_agree,
    end_of,
    every_count,
    every_prediction,
    network,
    ours,
    points_like,
    quiet,
    replay,
    theirs,
    timeless,
    visit,
)

from denoiselab.condition import Condition
from denoiselab.diffusion.grids import Karras, LogSNR
from denoiselab.diffusion.samplers import CLEAN, Adams, DPMSolverPP, Heun, points_of

DPM = DPMSolverMultistepScheduler
DPM_PP = partial(DPMSolverPP, grid=GRID, start="lower_order")
LMS = Adams(grid=GRID, variable="level", order=4, start="lower_order", steps=1)
PNDM = Adams(grid=GRID, variable="time", order=4, start="lower_order", steps=1)

pytestmark = quiet
some_predictions = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


# A last step onto the clean end is first order anyhow, whatever `lower_order_final` and `euler_at_final` say.
@every_count
@every_prediction
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("lower_order_final", "euler_at_final"), [(True, False), (False, False), (False, True)])
def test_dpm_solver_pp_2m(double, lower_order_final, euler_at_final, spacing, prediction, n):
    scheduler = DPM(
        prediction_type=prediction,
        timestep_spacing=spacing,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(n)
    sampler = DPM_PP(steps=n)
    points = points_like(scheduler, sampler)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
def test_dpm_solver_pp_2m_stopping_at_timestep_0(double, prediction, n):
    scheduler = DPM(
        prediction_type=prediction,
        timestep_spacing="trailing",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(n)
    sampler = DPM_PP(steps=n)
    points = [*points_like(scheduler, sampler)[:-1], end_of(PATH)]
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
@pytest.mark.parametrize(
    ("option", "grid"),
    [("use_karras_sigmas", Karras()), ("use_lu_lambdas", LogSNR()), ("use_exponential_sigmas", LogSNR())],
)
def test_dpm_solver_pp_2m_on_noise_level_grids(double, option, grid, prediction, n):
    scheduler = DPM(prediction_type=prediction, **{option: True})
    scheduler.set_timesteps(n)
    points = [*points_of(PATH, grid(PATH, n)), CLEAN]
    sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-9, atol=0)
    result = theirs(scheduler, START, timeless)
    assert_agree(ours(DPM_PP(steps=n), PATH, PREDICTIONS[prediction], START, points, timeless), result)


@every_count
@every_prediction
@pytest.mark.parametrize("grid", [GRID, Karras()])
def test_sde_dpm_solver_pp_2m(double, monkeypatch, grid, prediction, n):
    options = {"timestep_spacing": "trailing"} if grid is GRID else {"use_karras_sigmas": True}
    scheduler = DPM(algorithm_type="sde-dpmsolver++", prediction_type=prediction, **options)
    scheduler.set_timesteps(n)
    replay(monkeypatch, scheduler, n)
    points, asked = [*points_of(PATH, grid(PATH, n)), CLEAN], network if grid is GRID else timeless
    result = theirs(scheduler, START, asked)
    assert_agree(ours(DPM_PP(eta=1.0, steps=n), PATH, PREDICTIONS[prediction], START, points, asked), result)


@every_count
@every_prediction
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_unipc_2(double, spacing, prediction, n):
    """Theirs is bh2; ours has no bh1, which weighs the difference of two answers by h/2 instead of (1 − e^−h)/2."""
    scheduler = UniPCMultistepScheduler(prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    sampler = DPM_PP(corrector=True, steps=n)
    points = points_like(scheduler, sampler)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
def test_unipc_3(double, prediction, n):
    """With the published start. Theirs does not correct the last step: what is compared is the state before it."""
    scheduler = UniPCMultistepScheduler(
        solver_order=3,
        prediction_type=prediction,
        timestep_spacing="trailing",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(n)
    theirs(scheduler, START)
    sampler = DPM_PP(order=3, corrector=True, steps=n)
    points = points_like(scheduler, sampler)[:-1]
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), scheduler.last_sample)


def trailing(n):
    return points_of(PATH, GRID(PATH, n))


def goes_on_like_theirs(sampler, scheduler, prediction, begin, end):
    """Our steps from their corrected state at point `begin`, with what was answered until then, to theirs at `end`."""
    n = len(scheduler.timesteps)
    x, visits, states = START, [], []
    for t, point in zip(scheduler.timesteps, trailing(n), strict=True):
        visits.append(visit(PATH, PREDICTIONS[prediction], x, point))
        x = scheduler.step(network(x, t.double().expand(3), Condition()), t, x).prev_sample
        states.append(scheduler.last_sample)
    points = [v.point for v in visits[begin : end + 1]]
    assert_agree(
        ours(sampler, PATH, PREDICTIONS[prediction], states[begin], points, before=visits[: begin + 1]), states[end]
    )


@every_prediction
def test_unipc_with_bh1_is_the_same_method_once_it_has_three_answers(double, prediction):
    scheduler = UniPCMultistepScheduler(
        solver_order=3, solver_type="bh1", prediction_type=prediction, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    # Its last two steps are of lower order.
    goes_on_like_theirs(DPM_PP(order=3, corrector=True, steps=1), scheduler, prediction, 4, 18)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sa_solver(double, monkeypatch, eta):
    """With orders 3 and 4 and τ² = η. Its start differs: with two answers theirs weighs their difference otherwise."""
    scheduler = SASolverScheduler(
        predictor_order=3,
        corrector_order=4,
        tau_func=lambda t: eta**0.5,
        timestep_spacing="trailing",
        lower_order_final=False,
    )
    scheduler.set_timesteps(20)
    # Ours hears its first noise where it begins.
    draws = iter([NOISE.at((i - 4) % 20).normal("sampler", SHAPE, torch.float64) for i in range(20)])
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(draws))
    goes_on_like_theirs(DPM_PP(order=3, eta=eta, corrector=True, steps=1), scheduler, "epsilon", 4, 19)


@every_count
@every_prediction
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_deis(double, spacing, order, prediction, n):
    """Theirs ends at timestep 0, whatever the order of its last steps."""
    scheduler = DEISMultistepScheduler(
        solver_order=order, prediction_type=prediction, timestep_spacing=spacing, lower_order_final=False
    )
    scheduler.set_timesteps(n)
    sampler = Adams(grid=GRID, variable="log_level", order=order, start="lower_order", steps=n)
    points = [*points_like(scheduler, sampler)[:-1], end_of(PATH)]
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_lms(double, spacing, prediction, n):
    """But for the last step, which theirs takes with four answers, too, and ours onto x0."""
    scheduler = LMSDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    points = points_of(PATH, (scheduler.timesteps + 1) / 1000)
    result = theirs(scheduler, START / points[0].alpha, stop=-1)
    assert_agree(ours(LMS, PATH, PREDICTIONS[prediction], START, points) / points[-1].alpha, result)


@some_predictions
@pytest.mark.parametrize("n", [5, 20])
def test_pndm(double, prediction, n):
    """Theirs begins with a step of Heun's, and ends with four answers: what is compared is the state before that.

    With "v_prediction" theirs averages v and turns the mean into ε at the last point alone; only ε is the published method.
    """
    scheduler = PNDMScheduler(prediction_type=prediction, skip_prk_steps=True)
    scheduler.set_timesteps(n)
    points = points_of(PATH, (scheduler.timesteps.unique().flip(0) + 1).double() / 1000)
    first = visit(PATH, PREDICTIONS[prediction], START, points[0])
    x = ours(Heun(grid=GRID, steps=1), PATH, PREDICTIONS[prediction], START, points[:2])
    got = ours(PNDM, PATH, PREDICTIONS[prediction], x, points[1:], before=[first])
    expected = theirs(scheduler, START, stop=-1)
    if prediction == "epsilon":
        assert_agree(got, expected)
    else:
        assert (got - expected).abs().max() > 1e-3 * expected.abs().max()


@every_count
@some_predictions
@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (DPM, DPM_PP),
        (partial(DPM, algorithm_type="sde-dpmsolver++"), partial(DPM_PP, eta=1.0)),
        (UniPCMultistepScheduler, partial(DPM_PP, corrector=True)),
    ],
    ids=["dpmpp_2m", "sde_2m", "unipc_2"],
)
def test_as_shipped(monkeypatch, make, sampler, prediction, n):
    scheduler = make(prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    sampler = sampler(steps=n)
    if sampler.stochastic:
        replay(monkeypatch, scheduler, n)
    points = sampler.points(PATH, n)
    result = theirs(scheduler, START)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), result, tolerance=1e-5)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_as_shipped(order):
    scheduler = DEISMultistepScheduler(solver_order=order, timestep_spacing="trailing")
    scheduler.set_timesteps(20)  # from 15 on its last steps are of full order
    sampler = Adams(grid=GRID, variable="log_level", order=order, start="lower_order", steps=20)
    points = [*trailing(20), end_of(PATH)]
    result = theirs(scheduler, START)
    assert_agree(ours(sampler, PATH, PREDICTIONS["epsilon"], START, points), result, tolerance=1e-5)


def test_lms_as_shipped():
    scheduler = LMSDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    points = trailing(20)
    result = theirs(scheduler, START / points[0].alpha, stop=-1)
    got = ours(LMS, PATH, PREDICTIONS["epsilon"], START, points) / points[-1].alpha
    assert_agree(got, result, tolerance=1e-5)
