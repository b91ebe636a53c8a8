"""Starting a job's processes, one per device.

Lightning's own launcher for scripts started by Hydra runs the command line again in each child, which re-enters a multirun
and lets ranks compose different configs. Here the parent composes and checks once and hands every rank the same plain
config, through torch's elastic agent (the machinery of torchrun): a free port, the torchrun environment, and the end of
all ranks when one fails.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

from denoiselab.runs.errors import RankError


def launched_from_outside() -> bool:
    """Whether torchrun or a batch system has already started one process per device."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(function: Callable[..., None], arguments: tuple[Any, ...], devices: int) -> None:
    """Run `function(*arguments)` in `devices` new processes of this machine, and wait for them.

    Args:
        function: importable by its module's name.
        arguments: picklable.
        devices: number of processes.

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
    )
    try:
        elastic_launch(config, function)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if isinstance(message, dict):
            message = message.get("message", message)
        raise RankError(f"rank {rank} failed: {str(message).strip().partition(chr(10))[0]}") from None
