"""A search over hyper-parameters: optuna asks, a sweep's jobs answer.

Trials are jobs of a sweep like any others, and the study is an SQLite file in its folder. A trial whose job fails, diverges or
is refused is a failed trial; one whose intermediate values are worse than those of others is told to stop, saves, and is a
pruned one. What is asked next depends on the seed and on how many trials there are, so that a search that was stopped goes
on as if it had not been (with one job at a time and the same numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from denoiselab.app.compose import Composition, composition_message
from denoiselab.app.local_sweep import (
    LocalSweep,
    check_job,
    last_logged,
    print_sweep_of,
    resumable,
    say,
)
from denoiselab.app.sweep import STUDY, wait_for
from denoiselab.app.trained import without_consent
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.folder import working
from denoiselab.runs.local_jobs import run_jobs
from denoiselab.runs.sweep_folder import Job, Status, Sweep, add_jobs, read_job, read_sweep, sweep_name, write_status
from denoiselab.runs.trust import check_targets
from denoiselab.training.history import METRICS, read_rows, series

PICTURE = "search.png"
PROBES, MOST_PROBES = 3, 8  # points of the space that are tried before a search begins; more if none is legal
FOLDER = "folder"  # attribute of a trial: the folder of its job
SETTINGS: dict[str, Any] = {
    "metric": str,
    "mode": str,
    "trials": int,
    "seed": int,
    "sampler": str,
    "startup": int,
    "pruner": str,
    "warmup": int,
    "params": dict | None,
}
SAMPLERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed, startup: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True),
    "random": lambda seed, startup: optuna.samplers.RandomSampler(seed=seed),
}
MODES = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
PRUNERS: dict[str, Callable[[int, int], optuna.pruners.BasePruner]] = {
    "none": lambda startup, warmup: optuna.pruners.NopPruner(),
    "median": lambda startup, warmup: optuna.pruners.MedianPruner(startup, warmup),
    "halving": lambda startup, warmup: optuna.pruners.SuccessiveHalvingPruner(warmup or "auto"),
}


@dataclass
class Search:
    """A study and what it asks for.

    Args:
        settings: of the sweeper.
        space: what is searched, by key.
    """

    settings: dict[str, Any]
    space: dict[str, BaseDistribution]
    study: optuna.Study | None = None
    _reported: dict[int, int] = field(default_factory=dict)  # the last step of each job that the study was told of

    def __post_init__(self) -> None:
        check_settings(self.settings)
        if not self.space:
            raise ConfigError(
                "hydra/sweeper=optuna: nothing to search; give a key several values or an interval, as in "
                "'optimizer.lr=tag(log,interval(1e-4,1e-2))'"
            )

    def open(self, folder: Path) -> optuna.Study:
        """The study in the folder of a sweep, which is made if there is none."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY}",
            study_name="study",
            direction=MODES[self.settings["mode"]],
            load_if_exists=True,
            pruner=PRUNERS[self.settings["pruner"]](self.settings["startup"], self.settings["warmup"]),
        )
        return self.study

    def probes(self, count: int) -> list[list[str]]:
        """Some random points of the space, as overrides."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.settings["seed"]))
        trials = [study.ask(self.space) for _ in range(count)]
        return [[as_override(key, value) for key, value in trial.params.items()] for trial in trials]

    def ask(self) -> Trial:
        """The next trial."""
        assert self.study is not None
        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = SAMPLERS[self.settings["sampler"]](
            self.settings["seed"] + number, self.settings["startup"]
        )
        return self.study.ask(self.space)

    def left(self) -> int:
        """How many trials there are still to be."""
        assert self.study is not None
        return self.settings["trials"] - sum(FOLDER in t.user_attrs for t in self.study.get_trials(deepcopy=False))

    def unanswered(self, sweep: Path) -> list[tuple[Trial, Job]]:
        """Trials whose jobs were stopped together with the search; those that never had a job fail."""
        assert self.study is not None
        found = []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial = Trial(self.study, frozen._trial_id)
            try:
                found.append((trial, read_job(sweep / Path(frozen.user_attrs[FOLDER]).name)))
            except (KeyError, ConfigError):
                self.study.tell(trial, state=TrialState.FAIL)
        return found

    def prune(self, trial: Trial, job: Job) -> bool:
        """Tell the study what a running job has logged; whether it shall stop."""
        for step, value in series(job.folder, self.settings["metric"]).items():
            if step > self._reported.get(job.number, -1) and math.isfinite(value):
                trial.report(value, step)
                self._reported[job.number] = step
        return job.number in self._reported and trial.should_prune()

    def tell(self, trial: Trial, job: Job) -> None:
        """How a trial's job has ended.

        Raises:
            ConfigError: if a job that has finished did not log the metric.
        """
        assert self.study is not None
        status, metric = job.status, self.settings["metric"]
        if status.state in ("queued", "running", "preempted", "interrupted"):
            return  # it goes on when the search does
        value = (status.metric or {}).get("value")
        if status.state == "finished" and value is None and not series(job.folder, metric):
            rows = read_rows(job.folder / METRICS)
            logged = sorted({key for row in rows for key, cell in row.items() if cell and key != "step"})
            raise ConfigError(f"hydra.sweeper.metric={metric}: must be among what a job logs: {', '.join(logged)}")
        if status.state == "finished" and value is not None and math.isfinite(value):
            self.study.tell(trial, value)
        else:
            self.study.tell(trial, state=TrialState.PRUNED if status.state == "pruned" else TrialState.FAIL)

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial, if one has finished."""
        assert self.study is not None
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return self.study.best_trial if done else None


def run_search(
    search: Search,
    launcher: LocalSweep,
    fixed: Sequence[str],
    name: str | None,
    compose: Callable[[list[str]], Composition],
) -> None:
    """Ask, do and tell, until all trials are done; then say what was found.

    Args:
        search: what is asked.
        launcher: of the jobs.
        fixed: overrides of every trial.
        name: of the sweep.
        compose: overrides as a job.

    Raises:
        ConfigError: if no trial could begin, or the metric is not logged.
        RankError: if no trial has finished.
        Stopped: after a signal.
    """
    launcher.check()
    probes = _probe(search, launcher, fixed, compose)
    if launcher.settings["dry_run"]:
        print("\n".join(f"{key}  {distribution}" for key, distribution in search.space.items()))
        return
    slots = launcher.slots(probes)
    metric = {"name": search.settings["metric"], "mode": search.settings["mode"]}
    launcher.sweep = launcher.begin(name or sweep_name([list(search.space)]), metric)
    trials: dict[int, Trial] = {}

    def jobs() -> Iterator[Job]:
        assert launcher.sweep is not None
        for trial, job in search.unanswered(launcher.sweep.folder):
            trials[job.number] = trial
            wait_for(job)
            if job.status.state in ("finished", "failed", "pruned"):
                search.tell(trial, job)
            else:
                yield job
        while search.left() > 0:
            trial = search.ask()
            parameters = [as_override(key, value) for key, value in trial.params.items()]
            composed: Composition = ({}, {}, [*fixed, *parameters])
            refused = None
            try:
                composed = _compose(compose, composed[2])
                _check(launcher, composed[0])
            except ConfigError as error:
                refused = str(error)
            launcher.sweep, (job,) = add_jobs(launcher.sweep, [parameters], [composed])
            trial.set_user_attr(FOLDER, job.folder.name)
            trials[job.number] = trial
            if refused is None:
                yield job
                continue
            write_status(job.folder, Status(state="failed", exit_code=2, error=refused))
            say(f"[{job.number + 1}/{search.settings['trials']}] {job.name}: refused: {refused}")
            search.tell(trial, job)

    with working(launcher.sweep.folder), resumable(launcher.sweep):
        launcher.sweep = read_sweep(launcher.sweep.folder)  # another process may have gone on with it until now
        search.open(launcher.sweep.folder)
        run_jobs(
            launcher.sweep,
            jobs(),
            slots,
            total=search.settings["trials"],
            say=say,
            trust=launcher.trust,
            start=launcher.start,
            prune=lambda job: search.prune(trials[job.number], job),
            done=lambda job: search.tell(trials[job.number], job),
            logged=last_logged,
        )
    _conclude(search, launcher.sweep)


def _check(launcher: LocalSweep, config: dict[str, Any]) -> None:
    """See to it that a trial can begin; of a search that is gone on with, part of its config comes from a file.

    Raises:
        ConfigError: otherwise.
    """
    config = launcher.as_checked(config)
    if launcher.trust is not None:
        check_targets(config, launcher.trust)
        config = without_consent(config)
    check_job(config)
    launcher.check_room(config)


def _compose(compose: Callable[[list[str]], Composition], overrides: list[str]) -> Composition:
    """Overrides as a job.

    Raises:
        ConfigError: if they do not go together, as a key of one choice with another choice.
    """
    try:
        return compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composition_message(error, overrides)) from error


def _probe(
    search: Search, launcher: LocalSweep, fixed: Sequence[str], compose: Callable[[list[str]], Composition]
) -> list[dict[str, Any]]:
    """The configs of some points of the space, of which at least one could begin.

    Raises:
        ConfigError: if none of `MOST_PROBES` can, why the first cannot.
    """
    configs: list[dict[str, Any]] = []
    fine, first = False, None
    for number, parameters in enumerate(search.probes(MOST_PROBES)):
        if fine and number >= PROBES:
            break
        try:
            config, _, _ = _compose(compose, [*fixed, *parameters])
            configs.append(config)
            if not fine:
                _check(launcher, config)
                fine = True
        except ConfigError as error:
            first = first or error
    if not fine:
        assert first is not None
        raise first
    return configs


def _conclude(search: Search, sweep: Sweep) -> None:
    """The table of all trials, the best, and a picture of what mattered.

    Raises:
        RankError: if no trial has finished.
    """
    from denoiselab.reports.search_picture import draw_search

    print_sweep_of(sweep)
    best = search.best
    if best is None:
        raise RankError(f"no trial has finished; see the logs in {sweep.folder}")
    assert search.study is not None
    draw_search(search.study, search.settings["metric"], sweep.folder / PICTURE)
    words = " ".join(as_override(key, value) for key, value in best.params.items())
    print(f"best     trial {best.number}: {search.settings['metric']} {best.value:.5g}")
    print(f"         {words}")
    print(f"picture  {sweep.folder / PICTURE}")


def check_settings(settings: dict[str, Any]) -> None:
    """See to it that the settings of the sweeper are what they can be.

    Raises:
        ConfigError: otherwise.
    """
    for key, annotation in SETTINGS.items():
        if settings[key] is None and key == "metric":
            raise ConfigError("hydra.sweeper.metric=null: say which number is searched by, for example val/x0_mse")
        check_value(settings[key], annotation, f"hydra.sweeper.{key}")
    choices: dict[str, Any] = {"mode": MODES, "sampler": SAMPLERS, "pruner": PRUNERS}
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise ConfigError(f"hydra.sweeper.{key}={settings[key]}: must be one of {', '.join(allowed)}")
    for key, least in {"trials": 1, "startup": 0, "warmup": 0, "seed": 0}.items():
        if settings[key] < least:
            raise ConfigError(f"hydra.sweeper.{key}={settings[key]}: must be at least {least}")


def as_distribution(key: str, values: Sequence[str] | None, low: Any, high: Any, log: bool) -> BaseDistribution:
    """What a key is drawn from.

    Args:
        key: for messages.
        values: to choose among; None: an interval.
        low: end of the interval; whole numbers if both are.
        high: other end.
        log: draw its logarithm evenly.

    Raises:
        ConfigError: if an interval is none.
    """
    if values is not None:
        return CategoricalDistribution(list(values))
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    try:
        return kind(low, high, log=log)
    except ValueError as error:
        raise ConfigError(f"{key}=interval({low},{high}): {str(error).rstrip('.')}") from error


def as_override(key: str, value: Any) -> str:
    """A parameter as one would type it."""
    return f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
