"""Starting a job's processes, one per device.

Lightning's own launcher for scripts started by Hydra runs the command line again in each child, which re-enters a multirun
and lets ranks compose different configs. Here the parent composes and checks once and hands every rank the same plain
config, through torch's elastic agent (the machinery of torchrun): a free port, the torchrun environment, and the end of
all ranks when one fails.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from denoiselab.runs.errors import RankError
from denoiselab.runs.signals import STOPPING

PATIENCE = timedelta(days=7)  # ranks wait as long as the work of another takes: who ends a failed job is its launcher
ECHO_SECONDS = 5.0  # a rank that fails because another one has gone waits so long for the launcher to notice the first


def launched_from_outside() -> bool:
    """Whether torchrun or a batch system has already started one process per device."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(
    function: Callable[..., Any], arguments: tuple[Any, ...], devices: int, *, hand_on: Path | None = None
) -> Any:
    """Run `function(*arguments)` in `devices` new processes of this machine, and wait for them.

    Args:
        function: importable by its module's name.
        arguments: picklable.
        devices: number of processes.
        hand_on: signals that ask a job to stop are handed on to the processes, which know when they can, and noted in this
            file; None: they end the processes.

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
        with _quiet_agent(), _handing_on(hand_on) if hand_on else nullcontext():
            return elastic_launch(config, function)(*arguments)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if isinstance(message, dict):
            message = message.get("message", message)
        raise RankError(f"rank {rank} failed: {' '.join(str(message).split())}") from None


@contextmanager
def _handing_on(file: Path) -> Iterator[None]:
    """Inside, this process hands signals on to the processes that it has started.

    They begin with these signals blocked, as this thread has them, so that none ends a process that is not ready for it:
    each lets them through when it is (`training.signals.before_training`). What was handed on is noted in the file, since
    SIGTERM is also what the agent ends processes with when one has failed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()
    received: list[int] = []
    told: dict[int | None, int] = {}  # how many of them each process was told

    def note(number: int, frame: Any = None) -> None:
        received.append(number)

    def hand_on() -> None:
        noted = 0
        while not done.wait(0.1):
            for number in signal.sigpending() & STOPPING:
                note(signal.sigwait({number}))
            if len(received) > noted:
                noted = len(received)
                with suppress(OSError):  # a full disk must not keep the signal from the ranks
                    file.write_text("".join(f"{signal.Signals(number).name}\n" for number in received))
            for child in multiprocessing.active_children():  # some may not be there yet when a signal comes
                for number in received[told.get(child.pid, 0) :]:
                    with suppress(ProcessLookupError):
                        os.kill(child.pid or 0, number)
                told[child.pid] = len(received)

    resource_tracker.ensure_running()  # as the first process is spawned, which would unblock two of them
    before = {number: signal.signal(number, note) for number in STOPPING}  # if a library's thread gets it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    thread = threading.Thread(target=hand_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent logs a failure as pages; one line says it, unless all is asked for as everywhere in this program."""
    before = logging.root.manager.disable
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def echoes_last() -> Iterator[None]:
    """Inside, a failure that is how another rank's end reaches this one waits until the launcher has seen the first."""
    try:
        yield
    except Exception as error:
        if is_echo(error):
            time.sleep(ECHO_SECONDS)  # the launcher will end us meanwhile, for the sake of the rank that began it
        raise


def is_echo(error: BaseException) -> bool:
    """Whether a failure is how the end of another rank reaches this one: a collective that lost its partner."""
    import torch.distributed as dist

    frames = traceback.extract_tb(error.__traceback__)
    in_collective = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(dist.__file__).parent)
    return in_collective or any(word in str(error) for word in ("gloo/", "NCCL", "Connection closed by peer"))
