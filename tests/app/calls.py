"""The commands called in this process, the config composed without them, and a config that runs in a second."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import denoiselab.app
from denoiselab.app.compose import config_folder

ROOT = Path(__file__).parents[2]
CONF = config_folder()
NETWORK = [
    "backbone.width=8",
    "optimizer.lr=0.02",
    "schedule.warmup_steps=0",
]  # a rate that pixels show after few steps
SHORT = ["trainer.max_steps=4", "trainer.threads=1", "callbacks.monitor.every=2", "callbacks.pictures.rows=1"]
RUN = [*NETWORK, *SHORT, "sampler=heun", "sampler/grid=uniform", "sampler.nfe=20", "metrics.counts=[20]"]
QUIET = ["metrics=none", "logger=none"]


class Result(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """A run takes the process's logging over; give it back."""
    loggers = [logging.getLogger(), *map(logging.getLogger, ("lightning", "lightning.pytorch", "lightning.fabric"))]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, level, propagate in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def call(command: str, *arguments: str, cwd: Path) -> Result:
    """Run `denoiselab-<command>` from a folder, in this process."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [f"denoiselab-{command}", *arguments]
    with contextlib.chdir(cwd), logging_restored(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unable to enable fault handler")  # needs a real stderr
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                getattr(denoiselab.app, f"{command}_command")()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            finally:
                sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def run_script(command: str, *arguments: str, cwd: Path, **environment: str) -> Result:
    """Run `python scripts/<command>.py` from a folder, as a process of its own."""
    line = [sys.executable, str(ROOT / "scripts" / f"{command}.py"), *arguments]
    done = subprocess.run(
        line, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def only_run(cwd: Path) -> Path:
    """The one run folder below a working folder."""
    (run,) = (cwd / "runs").iterdir()
    return run


def composed(*overrides: str) -> dict[str, Any]:
    """The resolved config of a training run as plain data."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = OmegaConf.to_container(compose("train", list(overrides)), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def files_below(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
