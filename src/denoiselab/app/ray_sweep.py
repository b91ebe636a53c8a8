"""Sweeps on a Ray cluster: as on this machine, but that Ray finds each job a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from denoiselab.app.local_sweep import LOCAL_KEYS, LocalSweep, as_if_here, check_at_once
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.local_jobs import Process, Slot, Start
from denoiselab.runs.ray_jobs import Room, check_rooms, connect, start_on_ray
from denoiselab.runs.sweep_folder import Job, Sweep

RAY_KEYS: dict[str, Any] = LOCAL_KEYS | {"jobs": int, "address": str | None, "cpus_per_process": int}


@dataclass
class RaySweep(LocalSweep):
    """A sweep on a Ray cluster; see `LocalSweep`."""

    def check(self) -> None:
        """See to it that the settings are what they can be.

        Raises:
            ConfigError: otherwise.
        """
        for key, annotation in RAY_KEYS.items():
            check_value(self.settings.get(key), annotation, f"hydra.launcher.{key}")
        if self.settings["resume"] and self.settings["address"] not in (None, "auto"):
            raise ConfigError(
                "hydra.launcher.address: a sweep is gone on with where RAY_ADDRESS says, or on this machine"
            )
        check_at_once(self.settings["jobs"], "hydra.launcher.jobs")
        if self.settings["cpus_per_process"] < 1:
            value = self.settings["cpus_per_process"]
            raise ConfigError(f"hydra.launcher.cpus_per_process={value}: must be at least 1")

    def as_checked(self, config: dict[str, Any]) -> dict[str, Any]:
        """A job's config as this machine can check it."""
        return as_if_here(config)

    def check_room(self, config: dict[str, Any]) -> None:
        """See to it that a job occupies the room of one node.

        Raises:
            ConfigError: otherwise.
        """
        self.room(config)

    def slots(self, configs: Sequence[dict[str, Any]]) -> list[Slot]:
        """One for each job that Ray is asked to find room for; which room that is, Ray says.

        Raises:
            ConfigError: if there is no cluster, or a job would wait for ever.
        """
        rooms = [self.room(config) for config in configs]
        connect(self.settings["address"])
        check_rooms(rooms)
        return [Slot()] * self.settings["jobs"]

    def room(self, config: dict[str, Any]) -> Room:
        """What a job occupies.

        Raises:
            ConfigError: if it is not the room of one node.
        """
        trainer = config["trainer"]
        nodes, devices = trainer["num_nodes"], trainer["devices"]
        if nodes != 1:
            raise ConfigError(
                f"trainer.num_nodes={nodes}: a job of hydra/launcher=ray has one node; slurm gives it several"
            )
        if not isinstance(devices, int):
            raise ConfigError(f"trainer.devices={devices}: say how many for hydra/launcher=ray, which has to find them")
        gpu = trainer["accelerator"] != "cpu"
        return Room(cpus=devices * self.settings["cpus_per_process"], gpus=devices if gpu else 0)

    @property
    def start(self) -> Start:
        """Begins a job."""

        def begin(sweep: Sweep, job: Job, slot: Slot, trust: Sequence[str] | None) -> Process:
            return start_on_ray(sweep, job, self.room(job.config), trust)

        return begin

    @property
    def launcher(self) -> dict[str, Any]:
        """What of the settings is needed to go on with the sweep; of the address, which no file may name, if it was one."""
        kept = {key: self.settings[key] for key in ("jobs", "cpus_per_process")}
        return {"kind": "ray", **kept, "address": None if self.settings["address"] is None else "auto"}
