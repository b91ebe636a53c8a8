"""Starting a job's processes, one per device.

Lightning's own launcher for scripts started by Hydra runs the command line again in each child, which re-enters a multirun
and lets ranks compose different configs. Here the parent composes and checks once and hands every rank the same plain
config, through torch's elastic agent (the machinery of torchrun): a free port, the torchrun environment, and the end of
all ranks when one fails.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from denoiselab.runs.errors import RankError

ECHO_SECONDS = 5.0  # a rank that fails because another one has gone waits so long for the launcher to notice the first


def launched_from_outside() -> bool:
    """Whether torchrun or a batch system has already started one process per device."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(function: Callable[..., Any], arguments: tuple[Any, ...], devices: int, *, hand_on: bool = False) -> Any:
    """Run `function(*arguments)` in `devices` new processes of this machine, and wait for them.

    Args:
        function: importable by its module's name.
        arguments: picklable.
        devices: number of processes.
        hand_on: whether signals that ask a job to stop are handed on to the processes, which know when they can; otherwise
            they end the processes.

    Returns:
        What the function returns on rank 0.

    Raises:
        RankError: if a process fails; the message names the first cause.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle="SIGHUP,SIGQUIT" if hand_on else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",  # end the processes
    )
    try:
        with _handing_on() if hand_on else nullcontext():
            return elastic_launch(config, function)(*arguments)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if isinstance(message, dict):
            message = message.get("message", message)
        raise RankError(f"rank {rank} failed: {str(message).strip().partition(chr(10))[0]}") from None


@contextmanager
def _handing_on() -> Iterator[None]:
    """Inside, this process hands signals on to the processes that it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(number: int, frame: Any) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_echo(error: BaseException) -> bool:
    """Whether a failure is how the end of another rank reaches this one: a collective that lost its partner."""
    import torch.distributed as dist

    frames = traceback.extract_tb(error.__traceback__)
    in_collective = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(dist.__file__).parent)
    return in_collective or any(word in str(error) for word in ("gloo/", "NCCL", "Connection closed by peer"))
