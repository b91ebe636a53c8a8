"""The certificate measures what it says: right claims are inside their bounds, and each kind of wrong one is outside."""

import math

import pytest

from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.paths import Cosine, RectifiedFlow
from denoiselab.diffusion.prediction import Epsilon, V
from denoiselab.diffusion.samplers import DDIM, Adams, DPMSolverPP, Euler, Heun
from denoiselab.diffusion.samplers.single_step import ddim
from denoiselab.reports.certificate import (
    Row,
    certify_predictions,
    certify_sampler,
    conversion,
    error_curves,
    moment_error,
    orders,
)
from denoiselab.reports.certificate_pages import plot_curves, show, write_rows

GRID = {"grid": Uniform(), "steps": 1}
PATH = Cosine()


def outside(sampler, path=PATH):
    return {
        row.check for row in certify_sampler(type(sampler).__name__.lower(), sampler, "cosine", path) if not row.inside
    }


@pytest.mark.parametrize("sampler", [Euler(**GRID), Heun(**GRID), DPMSolverPP(**GRID), DDIM(**GRID, eta=0.5)])
def test_right_claims_are_inside(sampler):
    assert outside(sampler) == set()


class WrongWeight(Heun):
    """Second order in name: the first slope counts a little more."""

    tableau = (Heun.tableau[0], (0.52, 0.48))


class TooMuchNoise(DDIM):
    """η in place of η²: right at 0 and 1 only."""

    def step(self, x, q, history, ask, normal):
        right = super().step(x, q, history, ask, lambda: 0 * x)
        return right + 1.5 * (super().step(x, q, history, ask, normal) - right)


class Leaky(Euler):
    """Forgets a thousandth of the noise on the way."""

    def step(self, x, q, history, ask, normal):
        said = history[-1].posterior
        return ddim(said.x0, 0.98 * said.eps, q)


class WithoutSlope(DPMSolverPP):
    """Second order in name, but only the latest answer counts."""

    def _latest(self, history):
        return super()._latest(history)[:1]


class Costly(Euler):
    """Asks twice a step."""

    def step(self, x, q, history, ask, normal):
        ask(x, history[-1].point)
        return super().step(x, q, history, ask, normal)


@pytest.mark.parametrize(
    ("sampler", "caught"),
    [
        (WrongWeight(**GRID), {"order", "shipped"}),
        (TooMuchNoise(**GRID, eta=1.0), {"moments"}),
        (WithoutSlope(**GRID, eta=1.0), {"moments"}),
        (Costly(**GRID), {"nfe"}),
        (Leaky(**GRID), {"order"}),
        (DPMSolverPP(**GRID, order=3, start="lower_order"), {"shipped"}),
        (Adams(**GRID, variable="level", order=3, start="lower_order"), {"shipped"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_claims_are_outside(sampler, caught):
    assert caught <= outside(sampler)


def test_orders_are_those_of_the_literature():
    """A third-order Adams method is of third order from exact starting values and of second from an Euler start."""
    exact, shipped = orders(Adams(**GRID, variable="level", order=3, start="lower_order"), PATH)
    assert exact == pytest.approx(3, abs=0.1)
    assert shipped == pytest.approx(2, abs=0.15)


def test_moment_errors_fall_with_the_steps():
    coarse, fine = (moment_error(DDIM(**GRID, eta=1.0), PATH, steps) for steps in (50, 100))
    assert 1.7 < coarse / fine < 2.3


def test_conversions_are_exact_and_illegal_pairs_refused():
    assert conversion(PATH, V()) < 1e-14
    assert conversion(RectifiedFlow(), Epsilon()) == math.inf
    rows = certify_predictions({"v": V(), "epsilon": Epsilon()}, {"flow": RectifiedFlow()})
    assert [(row.check, row.inside) for row in rows] == [("conversion", True), ("refused", True)]
    assert not Row("v", "cosine", "refused", 1e-15, 1e-11).inside  # nothing is lost: it should not be refused
    assert not Row("x", "y", "order", math.nan, 1.85, 2.15).inside


def test_pages(tmp_path):
    rows = certify_predictions({"v": V(), "epsilon": Epsilon()}, {"rectified_flow": RectifiedFlow()})
    rows += certify_sampler("heun", Heun(**GRID), "rectified_flow", RectifiedFlow())
    write_rows(rows, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| rectified_flow |" in page
    assert "refused" in page
    assert "| heun | rectified_flow | 2.00 | 2.00 |" in page
    assert len((tmp_path / "table.csv").read_text().splitlines()) == len(rows) + 1
    assert show(Row("x", "y", "order", 1.5, 1.85, 2.15)) == "1.50 OUTSIDE"
    plot_curves(error_curves({"heun": Heun(**GRID), "mine": Euler(**GRID)}, "cosine", PATH), tmp_path)
    assert (tmp_path / "error_against_nfe.png").stat().st_size > 10_000
