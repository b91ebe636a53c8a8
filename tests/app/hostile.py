"""Checkpoints as an enemy would write them, and a child process in which it does no harm to open them."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import resource
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from calls import CONF, NETWORK, composed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from denoiselab.app.nodes import make_network

FILE = "hostile.ckpt"
MEMORY = 1 << 30  # bytes above what the process has already
SECONDS = 60
SMALL = [*NETWORK, "backbone.multipliers=[1]", "backbone.attention_resolutions=[]", "metrics=none", "logger=none"]


@functools.cache
def _good() -> dict[str, Any]:
    config = composed(*SMALL, "sampler.nfe=3")
    network = make_network(config)
    weights = network.state_dict()
    return {
        "state_dict": {f"network.{key}": value for key, value in weights.items()},
        "ema": {"ema": {key: value.clone() for key, value in network.named_parameters()}},
        "schema": 1,
        "config": config,
        "ema_updates": 1,
        "global_step": 7,
    }


def good() -> dict[str, Any]:
    """A checkpoint that is as it should be, to be changed at will."""
    with torch.no_grad():
        return copy.deepcopy(_good())


@functools.cache
def _training() -> dict[str, Any]:
    return composed(*SMALL)


def training(**changes: Any) -> dict[str, Any]:
    """The config of a small training run."""
    return copy.deepcopy(_training()) | changes


@functools.cache
def _options(command: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose(command), resolve=True, throw_on_missing=True)
    return plain


def options(command: str, **changes: Any) -> dict[str, Any]:
    """The composed options of a command, on the CPU."""
    return copy.deepcopy(_options(command)) | {"device": "cpu"} | changes


def write_pickle(path: Path, pickled: bytes, called: str = "data.pkl") -> None:
    """An archive like torch.save's, with a pickle of one's own, under a name of one's own."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            given = name.replace("data.pkl", called)
            target.writestr(given, pickled if name.endswith("data.pkl") else source.read(name))
            target.getinfo(given).external_attr = 0  # as torch leaves it


def pickled_call(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls a function when it is loaded, by opcodes that torch's own reader knows."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R."


class Outcome(NamedTuple):
    """How a function ended: the kind of its exception (empty if there was none), its message, and the memory it took."""

    kind: str
    message: str
    bytes: int


def isolated(function: Callable[[], Any], cwd: Path) -> Outcome:
    """Call a function in a forked child with little memory and time, from a folder."""
    return isolated_each([function], cwd)[0]


def isolated_each(functions: Sequence[Callable[[], Any]], cwd: Path) -> list[Outcome]:
    """The same of several, one after the other in one child; none but `died` where the child did not live to tell."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _limit()
            os.chdir(cwd)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pickle.dumps([tuple(_outcome(function)) for function in functions]))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return [Outcome(*told) for told in pickle.loads(answer)] if answer else [Outcome("died", f"status {status}", 0)]


def _limit() -> None:
    def late(*_: Any) -> None:
        raise TimeoutError("takes too long")

    signal.signal(signal.SIGALRM, late)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def _outcome(function: Callable[[], Any]) -> Outcome:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind = message = ""
    signal.alarm(SECONDS)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        try:
            function()
        except BaseException as error:
            kind, message = type(error).__name__, str(error)
            if kind != "ConfigError":
                message += "".join(traceback.format_exception(error)[-4:])
    return Outcome(kind, message[:5000], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


assert sys.platform == "linux"
