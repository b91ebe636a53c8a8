"""Launchers and a sweeper for Hydra's multirun; imported at each start, so what is heavy is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class _SweepLauncher(Launcher):
    """Composes the jobs of a sweep and hands them to denoiselab, all at once, as plain data."""

    sweep: Any
    composed: Any  # what Hydra calls with each config: `app.compose.Composed`

    def __init__(self, **settings: Any) -> None:
        self.settings: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what is needed to compose."""
        self.context, self.composed, self.config = hydra_context, task_function, config

    def compose(self, job_overrides: Sequence[Sequence[str]]) -> list[Any]:
        """The jobs as plain data."""
        for overrides in job_overrides:
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
            self.composed(config)
        jobs, self.composed.jobs = self.composed.jobs, []
        self.composed.check()
        return jobs


class LocalLauncher(_SweepLauncher):
    """Jobs on this machine, each a process group of its own.

    Args:
        folder: of the sweep, which must be new; null: one of its own below root.
        root: where folders of sweeps are made.
        jobs: how many work at a time; "auto": as many as have GPUs of their own.
        metric: that stands for a job in tables.
        dry_run: only say which jobs there are.
    """

    def new_sweep(self) -> Any:
        """A sweep on this machine."""
        from denoiselab.app.local_sweep import LocalSweep

        return LocalSweep(**self.what())

    def what(self) -> dict[str, Any]:
        """What a sweep begins with."""
        typed = OmegaConf.to_container(self.config.hydra.overrides.task)
        return {"settings": self.settings, "typed": typed, "trusted": list(self.config.get("trust") or [])}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        """Do the jobs; a job that fails is written down, and said once all are done."""
        jobs = self.compose(job_overrides)
        if initial_job_idx == 0:
            self.sweep = self.new_sweep()
            self.composed.closing.append(self.sweep.conclude)
        with self.composed.at_work():
            done = self.sweep.launch(job_overrides, jobs)
        basic = self.config.hydra.sweeper._target_.endswith(".BasicSweeper")  # it would stop at the first that failed
        return [_returned(job, basic) for job in done]


def _returned(job: Any, basic: bool) -> JobReturn:
    """What a sweeper is told of a job that has ended: the number that stands for it, or that it has failed.

    Args:
        job: a `denoiselab.runs.sweep_folder.Job`.
        basic: whether the sweeper takes all jobs for done, whatever has become of them.
    """
    from denoiselab.runs.errors import RankError

    status = job.status
    value = (status.metric or {}).get("value")
    if basic or (status.state == "finished" and value is not None):
        return JobReturn(overrides=job.overrides, _return_value=value, status=JobStatus.COMPLETED)
    why = status.error or ("it has not logged the metric" if status.state == "finished" else status.state)
    error = RankError(f"job {job.number} ({job.name}): {why}; its log: {job.folder / status.log}")
    return JobReturn(overrides=job.overrides, _return_value=error, status=JobStatus.FAILED)


class RayLauncher(LocalLauncher):
    """Jobs on a Ray cluster; see conf/hydra/launcher/ray.yaml for its settings."""

    def new_sweep(self) -> Any:
        """A sweep on the cluster."""
        from denoiselab.app.ray_sweep import RaySweep

        return RaySweep(**self.what())


class SlurmLauncher(_SweepLauncher):
    """Jobs as an array of Slurm; see conf/hydra/launcher/slurm.yaml for its settings."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        """Submit the jobs."""
        from denoiselab.app.cluster import SlurmSweep

        jobs = self.compose(job_overrides)
        if initial_job_idx == 0:
            typed: Any = OmegaConf.to_container(self.config.hydra.overrides.task)
            self.sweep = SlurmSweep(settings=self.settings, typed=typed)
        with self.composed.at_work():
            done = self.sweep.launch(job_overrides, jobs)
        return [JobReturn(overrides=job.overrides, _return_value=job, status=JobStatus.COMPLETED) for job in done]


class OptunaSweeper(Sweeper):
    """Asks optuna what to try next; see `denoiselab.app.search`.

    Keys with several values or an interval are searched: `optimizer.lr=tag(log,interval(1e-4,1e-2))`, `backbone=unet,dit`,
    `backbone.depth=int(interval(2,8))`.

    Args:
        metric: a number that a run logs, such as val/x0_mse or fd_digits_500.
        mode: "min" or "max".
        trials: how many, failed and pruned ones too.
        seed: of what is asked.
        sampler: "tpe" or "random".
        startup: trials at random before the others, and before "median" stops any.
        pruner: "none", "median" or "halving": which trials are stopped early, by what they have logged of the metric.
        warmup: training steps before a trial may be stopped.
        params: further keys to search or to set, as on the command line.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        self.context, self.config = hydra_context, config
        self.composed: Any = task_function
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search."""
        from denoiselab.app.search import Search, as_distribution, run_search
        from denoiselab.runs.errors import ConfigError

        if not isinstance(self.launcher, LocalLauncher):
            raise ConfigError("hydra/sweeper=optuna: needs hydra/launcher=local or ray, whose jobs it can watch")
        words = [f"{key}={value}" for key, value in (self.settings["params"] or {}).items()] + arguments
        fixed: list[str] = []
        space: dict[str, Any] = {}
        for override in OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(words):
            key, value = override.get_key_element(), override.value()
            space.pop(key, None)  # a later word about a key is the last
            fixed = [word for word in fixed if word.partition("=")[0] != key]
            if isinstance(value, IntervalSweep):
                space[key] = as_distribution(key, None, value.start, value.end, "log" in value.tags)
            elif override.is_sweep_override():
                space[key] = as_distribution(key, list(override.sweep_string_iterator()), None, None, False)
            else:
                fixed.append(f"{key}={override.get_value_element_as_str()}")
        name = None if self.config is None else self.config.name
        with self.composed.at_work():
            search = Search(self.settings, space)
            run_search(search, self.launcher.new_sweep(), fixed, name, lambda o: self.launcher.compose([o])[0])
