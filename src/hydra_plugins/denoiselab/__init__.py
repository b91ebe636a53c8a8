"""Launchers for Hydra's multirun. Hydra imports this at each start, so what is heavy is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class _SweepLauncher(Launcher):
    """Composes the jobs of a sweep and hands them to denoiselab, all at once, as plain data."""

    sweep: Any
    composed: Any  # what Hydra calls with each config: `app.compose.Composed`

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

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

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, prune: Any = None) -> Any:
        """Do the jobs; a job that fails is written down, and said once all are done."""
        from denoiselab.app.sweep import LocalSweep

        jobs = self.compose(job_overrides)
        if initial_job_idx == 0:
            typed = OmegaConf.to_container(self.config.hydra.overrides.task)
            self.sweep = LocalSweep(settings=self.settings, typed=typed)  # type: ignore[arg-type]
            self.composed.closing.append(self.sweep.conclude)
        with self.composed.at_work():
            done = self.sweep.launch(job_overrides, jobs, prune)
        return [JobReturn(overrides=job.overrides, _return_value=job, status=JobStatus.COMPLETED) for job in done]
