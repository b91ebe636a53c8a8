"""Jobs of a sweep on a Ray cluster: each is held by an actor, on whatever node Ray has room for it.

A job is the same process group as on one machine. The actor starts it, says whether it is over and hands signals on; all
nodes see the folder of the sweep, the working folder and Python under the same paths. If the sweep's process or its node is
lost, Ray ends the actors, and the jobs are told to stop and save.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.local_jobs import LocalProcess, Process, Slot, job_command, job_environment
from denoiselab.runs.secrets import is_secret_name
from denoiselab.runs.signals import held_back
from denoiselab.runs.sweep_folder import LOG, Job, Sweep, write_status

# Ray kills the children of an actor that it ends, but not theirs: what stands between is killed, and the job, which hears of
# the end of its parent, saves. Signals to it alone are not for what stands between.
BETWEEN = ("/bin/sh", "-c", 'trap : INT TERM USR1 USR2; "$@"; exit $?', "job")
SECONDS = 10  # for a cluster to answer
CARRIED = ("PYTHONPATH", "DENOISELAB_", "WANDB_")  # variables of the sweep's process that jobs elsewhere have as well


@dataclass(frozen=True)
class Room:
    """What a job occupies on one node.

    Args:
        cpus: cores.
        gpus: devices.
    """

    cpus: int
    gpus: int


class _Holder:
    """Holds a job's process, in a process of Ray; see `LocalProcess`."""

    def __init__(self, command: Sequence[str], directory: str, log: Path, carried: Mapping[str, str]) -> None:
        own = {key: value for key, value in job_environment(os.environ, Slot()).items() if not key.startswith("RAY_")}
        self._process = LocalProcess(
            command=[*BETWEEN, *command], directory=directory, log=log, environment=own | dict(carried)
        )

    def ended(self) -> int | None:
        """Its exit code, once it is over."""
        code = self._process.returncode if self._process.is_over() else None
        return code if code is None or code <= 128 else _as_signal(code)

    def tell(self, number: int) -> None:
        """Send the job's first process a signal."""
        between = self._process.pid
        for child in Path(f"/proc/{between}/task/{between}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    def kill(self) -> None:
        """End all of it."""
        self._process.kill()


def _as_signal(code: int) -> int:
    """The exit code of a shell as `subprocess` says it, where a signal that cannot be answered has ended its command."""
    return 128 - code if code - 128 in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS) else code


class RayProcess:
    """A job on a Ray cluster, as `run_jobs` sees it.

    Args:
        actor: that holds it.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._asked: Any = actor.ended.remote()
        self._begun = self._over = False
        self.returncode: int | None = None
        self.why: str | None = None

    def is_over(self) -> bool:
        """Whether it has ended, or has been lost."""
        import ray

        if self._over or not ray.wait([self._asked], timeout=0)[0]:
            return self._over
        try:
            self.returncode = ray.get(self._asked)
        except ray.exceptions.RayError as error:
            self.returncode, self.why = -signal.SIGKILL, f"Ray has lost it: {' '.join(str(error).split())[:300]}"
        self._begun, self._over = True, self.returncode is not None
        if self._over:
            ray.kill(self._actor)
        else:
            self._asked = self._actor.ended.remote()
        return self._over

    def tell(self, number: int) -> None:
        """Send it a signal; one that has found no room yet is taken back."""
        import ray

        self.is_over()
        if self._begun:
            self._actor.tell.remote(number)
        else:
            self._over = True
            ray.kill(self._actor)

    def kill(self) -> None:
        """End it at once."""
        import ray

        if not self._over:
            with suppress(ray.exceptions.RayError):
                ray.get(self._actor.kill.remote(), timeout=10)
            self._over, self.returncode = True, -signal.SIGKILL if self._begun else None
            ray.kill(self._actor)


def connect(address: str | None) -> None:
    """Join a Ray cluster, or start Ray on this machine.

    Args:
        address: of the cluster, host:port; "auto": of the one that RAY_ADDRESS says or this machine belongs to; None: none.

    Raises:
        ConfigError: if that cannot be.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("hydra/launcher=ray: needs pip install -e '.[ray]'") from error
    if ray.is_initialized():
        return
    place = "local" if address is None else _answering(address)
    try:
        with held_back():  # Ray would answer signals itself
            ray.init(address=place, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _no_cluster(address, " ".join(str(error).split())[:200]) from error


def _answering(address: str) -> str:
    """The address of a cluster, of which somebody answers there: Ray would try for minutes, and end this process.

    Raises:
        ConfigError: if nobody does.
    """
    found = address
    if address == "auto":
        here = Path("/tmp/ray/ray_current_cluster")  # where Ray itself looks
        found = os.environ.get("RAY_ADDRESS") or (here.read_text().strip() if here.exists() else "")
    host, _, port = found.rpartition(":")
    if not host or not port.isdigit() or "//" in host:
        raise _no_cluster(address, f"{found}: must be host:port" if found else "RAY_ADDRESS is not set")
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, f"{found}: {error}") from error
    return found


def _no_cluster(address: str | None, why: str) -> ConfigError:
    return ConfigError(
        f"hydra.launcher.address={address}: there is no Ray cluster ({why}); null starts Ray on this machine"
    )


def check_rooms(rooms: Sequence[Room]) -> None:
    """See to it that some node could hold each job: Ray would wait for ever.

    Raises:
        ConfigError: otherwise.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for room in rooms:
        if not any(node.get("CPU", 0) >= room.cpus and node.get("GPU", 0) >= room.gpus for node in nodes):
            there = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
            raise ConfigError(
                f"hydra/launcher=ray: a job needs {room.cpus} cores and {room.gpus} GPUs of one node (trainer.devices, "
                f"hydra.launcher.cpus_per_process), and the nodes have {there}"
            )


def start_on_ray(sweep: Sweep, job: Job, room: Room, trust: Sequence[str] | None) -> Process:
    """Hand a job to Ray."""
    import ray

    write_status(job.folder, replace(job.status, state="queued", exit_code=None, error=None))
    own = job_environment(os.environ, Slot(), sweep.code)
    carried = {key: value for key, value in own.items() if key.startswith(CARRIED) and not is_secret_name(key)}
    holder = ray.remote(num_cpus=room.cpus, num_gpus=room.gpus)(_Holder)
    return RayProcess(holder.remote(job_command(job.folder, None, trust), sweep.directory, job.folder / LOG, carried))
