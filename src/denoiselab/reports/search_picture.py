"""A search as a picture: how it went, what mattered, and where the good values are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes

MOST = 6  # parameters that have a panel of their own: those that matter most
DONE, PRUNED, BEST = "#0072B2", "#999999", "#D55E00"  # Okabe & Ito's colours


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of each parameter in how the metric varies (fANOVA, Hutter et al. 2014), largest first.

    Empty for fewer than four finished trials, or if all are alike.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    done = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    if len(done) < 4 or len({t.value for t in done}) < 2:
        return {}
    return optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def draw_search(study: optuna.Study, metric: str, path: Path) -> None:
    """Write a PNG: the metric by trial with the best so far, the importances, and the metric against each parameter."""
    import optuna
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    states = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == states.COMPLETE]
    stopped = [t for t in trials if t.state == states.PRUNED and t.value is not None]
    shares = importances(study)
    keys = list(shares) or list(dict.fromkeys(key for t in done for key in t.params))
    panels = keys[:MOST]
    columns = max(2, min(3, len(panels)))
    rows = 1 + -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    history = figure.add_subplot(grid[0, : columns - 1])
    minimise = study.direction == optuna.study.StudyDirection.MINIMIZE
    best = (np.minimum if minimise else np.maximum).accumulate(_values(done))
    history.plot([t.number for t in stopped], _values(stopped), "x", color=PRUNED, label="stopped early")
    history.plot([t.number for t in done], _values(done), "o", color=DONE, label="finished")
    history.step([t.number for t in done], best, where="post", color=BEST, label="best so far")
    failed = [t.number for t in trials if t.state == states.FAIL]
    for index, number in enumerate(failed):
        history.axvline(number, color=PRUNED, linestyle=":", label="failed" if index == 0 else None)
    history.set(xlabel="trial", ylabel=metric)
    _log_if_wide(history, _values(done))
    history.legend(fontsize="small")
    bars = figure.add_subplot(grid[0, columns - 1])
    if shares:
        bars.barh(list(shares)[::-1], list(shares.values())[::-1], color=DONE)
        bars.set(xlabel="importance (share of the variance)", xlim=(0, 1))
    else:
        bars.text(
            0.5, 0.5, "importance needs\nfour finished trials", ha="center", va="center", transform=bars.transAxes
        )
        bars.set_axis_off()
    for index, key in enumerate(panels):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns])
        given = [t for t in done if key in t.params]
        values = [t.params[key] for t in given]
        if any(isinstance(value, str) for value in values):
            values = list(map(str, values))
        axes.plot(values, _values(given), "o", color=DONE)
        if study_best := next((t for t in given if t.number == study.best_trial.number), None):
            axes.plot([study_best.params[key]], _values([study_best]), "o", color=BEST)
        if given and getattr(given[0].distributions[key], "log", False):
            axes.set_xscale("log")
        _log_if_wide(axes, _values(given))
        axes.set(xlabel=key, ylabel=metric)
    figure.savefig(path, dpi=120)


def _values(trials: Sequence[optuna.trial.FrozenTrial]) -> list[float]:
    return [float("nan") if t.value is None else t.value for t in trials]


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than a decade."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
