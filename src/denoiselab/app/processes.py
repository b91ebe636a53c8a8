"""A function in one or in several processes, for the commands that load a run: sample, evaluate, frontier."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import record

from denoiselab.app.trained import choose_device
from denoiselab.evaluation.collect import broadcast, ranks
from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.launch import PATIENCE, echoes_last, launch, launched_from_outside
from denoiselab.runs.secrets import redact_terminal
from denoiselab.training.trainer import free_cores

MEETING = timedelta(minutes=10)  # all ranks must be there by then


def agree(value: str, what: str) -> None:
    """See to it that every rank has the same value; to be called on all of them.

    Raises:
        ConfigError: on a rank that has another one than rank 0.
    """
    first = broadcast(value)
    if value != first:
        raise ConfigError(f"{what}={value}: on rank {ranks()[0]}, but rank 0 has {first}; name the checkpoint")


def choose_devices(devices: int | str, device: str) -> int:
    """How many processes work together, over all machines; a launcher such as torchrun has the last word.

    Args:
        devices: of this machine, at least 1; "auto" is every GPU, or one process on the CPU.
        device: "cpu", "cuda" or "auto".

    Raises:
        ConfigError: if there are not so many, or a launcher has started another number.
    """
    kind = choose_device(device).type
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if launched_from_outside():
        started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if devices not in ("auto", 1, started):
            raise ConfigError(f"devices={devices}: the launcher has started {started} processes on this machine")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is loaded onto the first GPU
        return int(os.environ["WORLD_SIZE"])
    if devices == "auto":
        return gpus or 1
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError(f"devices={devices}: must be at least 1, or auto for every GPU")
    if gpus and devices > gpus:
        raise ConfigError(f"devices={devices}: this machine has {gpus} GPUs")
    return devices


def run_processes(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    devices: int | str,
    device: str,
    *,
    ready: tuple[Any, ...] = (),
) -> Any:
    """Call `function(*arguments)` in every process of a job, and return what it returns on rank 0.

    With several, the default process group is there while the function runs: gloo for CPU tensors, and NCCL for those on
    GPUs, of which each rank has one as its current device.

    Args:
        function: of a module, not a nested one; it calls collectives on all ranks or on none.
        arguments: picklable, as is the result.
        devices: processes on this machine, or "auto".
        device: "cpu", "cuda" or "auto".
        ready: further arguments for the case that the function runs in this very process, to spare it the work of making
            them again, for example a loaded run.

    Returns:
        The result of rank 0; None on the other ranks that a launcher such as torchrun has started.

    Raises:
        ConfigError: if there are not so many devices.
        RankError: if a process fails; the message names the rank and the first cause, and by then the others have been
            ended.
        Stopped: if a signal stops them.
    """
    count, kind = choose_devices(devices, device), choose_device(device).type
    if launched_from_outside():
        threads = free_cores(int(os.environ.get("LOCAL_WORLD_SIZE", count)))
        try:
            return record(_in_group)(function, (*arguments, *ready), kind, threads)
        except ConfigError:
            raise
        except Exception as error:
            cause = str(error).strip().partition("\n")[0]
            raise RankError(f"rank {os.environ['RANK']} failed: {type(error).__name__}: {cause}") from error
    threads = free_cores(count)  # asked while the cores are still free
    if count == 1:
        torch.set_num_threads(threads)
        return function(*arguments, *ready)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        try:
            launch(_child, (function, arguments, kind, threads, str(result)), count)
        except SignalException as error:
            raise Stopped(error.sigval) from error
        return pickle.loads(result.read_bytes())  # written by our own child


@record
def _child(function: Callable[..., Any], arguments: tuple[Any, ...], kind: str, threads: int, result: str) -> None:
    """What a process that was started for this does."""
    value = _in_group(function, arguments, kind, threads)
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        Path(result).write_bytes(pickle.dumps(value))


def meet(kind: str) -> None:
    """Make the default process group of processes that a launcher has started; they meet once, also for several jobs.

    Args:
        kind: "cpu" or "cuda".
    """
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if dist.is_initialized():
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=MEETING)
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # as older torch has it
    set_timeout(PATIENCE)


def _in_group(function: Callable[..., Any], arguments: tuple[Any, ...], kind: str, threads: int) -> Any:
    """Call the function as a member of the process group; its value on rank 0, else None."""
    torch.set_num_threads(threads)
    redact_terminal()  # a process that was started for this has not been through the command line
    meet(kind)
    with echoes_last():  # and then leave the group as it is: to leave it in good order, one would wait for the others
        value = function(*arguments)
        dist.all_reduce(torch.zeros(1))  # rank 0 speaks for all: it may not be done before they are
    return value if dist.get_rank() == 0 else None
