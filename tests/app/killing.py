"""Training jobs forked from one warm process, killed at chosen places, and compared with one that nobody killed.

A warm process has imported everything and computed nothing, so that a start costs a fraction of a second. A job notes what
each execution of each step has seen, in a file beside its run folder; the notes of all its starts stay.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from denoiselab.training.checkpoint import load_checkpoint, newest_checkpoint
from denoiselab.training.dropout import KeyedDropout

UNET = [
    "backbone=unet",
    "backbone.width=8",
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "backbone.dropout=0.2",
]
DIT = ["backbone=dit", "backbone.hidden_size=32", "backbone.depth=1", "backbone.num_heads=2"]
CHOICES = {"datamodule": "digits", "backbone": "unet", "objective": "rectified_flow"}
warm = multiprocessing.get_context("forkserver")
warm.set_forkserver_preload(["denoiselab.app.train", "sklearn.datasets", "scipy.linalg", "wandb", "pytest"])


FEW = 8  # steps


class Trap:
    """Kills this process at the n-th time that it does a certain thing after a certain step has begun.

    Things are: a step that begins ("step/12"), a batch of validation ("validation"), and each file or folder of the run that
    is opened, renamed, linked or removed ("checkpoints/step_0000003.ckpt", "metrics.csv"), just before it happens. A run that
    does no such thing is killed a few steps later.

    Args:
        run: the folder of the run.
        step: the first one that counts, from 1; 0 counts from the start.
        thing: how its name begins; "" for all of them, "time" for none.
        count: how many it lets pass, at least 0; milliseconds for "time", told by another process.
    """

    def __init__(self, run: str, *, step: int, thing: str, count: int) -> None:
        self.run, self.step, self.thing, self.count = f"{run}/", step, thing, count
        self.process, self.set = os.getpid(), False
        if step == 0:
            self._set()

    def _set(self) -> None:
        self.set = True
        if self.thing == "time" and os.fork() == 0:
            time.sleep(self.count / 1000)
            if os.getppid() == self.process:
                os.kill(self.process, signal.SIGKILL)
            os._exit(0)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What Python says that it is about to do."""
        if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir") and str(arguments[0]).startswith(
            self.run
        ):
            self.passing(str(arguments[0]).removeprefix(self.run))

    def passing(self, thing: str) -> None:
        """Something is about to happen; perhaps nothing comes after it."""
        if os.getpid() != self.process:  # a loader's worker
            return
        step = int(thing.removeprefix("step/")) if thing.startswith("step/") else 0
        if not self.set and step >= self.step:
            self._set()
        if self.set and thing.startswith(self.thing):
            self.count -= 1
        if self.count < 0 or step > self.step + FEW > FEW:
            with open(f"{self.run[:-1]}.kills", "a") as file:
                file.write(f"{thing}\n")
            os.kill(self.process, signal.SIGKILL)


trap: Trap | None = None


class Recorder(Callback):
    """Notes what each micro-batch of training saw: a line of JSON, written before the step's update.

    A line holds step and rank and, for each sample, its place, index, t, loss, label (−1 where it was dropped), the digests of
    its noise and of its dropout masks.

    Args:
        file: to append to.
    """

    def __init__(self, *, file: str) -> None:
        self.file = file
        self.batch: dict[str, Tensor] = {}
        self.noted: dict[str, Any] = {}
        self.masks: list[Any] = []

    def on_train_start(self, trainer, pl_module) -> None:
        network, objective, rank = pl_module.network, pl_module.objective, trainer.global_rank
        inner = objective.coupling

        def coupling(x0, noise, condition):
            eps = inner(x0, noise, condition)
            self.noted = {"step": noise.step, "place": noise.index.tolist(), "noise": [_digest(row) for row in eps]}
            self.masks = [hashlib.sha256() for _ in eps]
            return eps

        def seen(module, arguments) -> None:
            if module.training:
                self.noted["label"] = arguments[2].label.tolist()

        def dropped(module, arguments, output) -> None:
            if module.training:
                for mask, row in zip(self.masks, output, strict=True):
                    mask.update((row == 0).numpy().tobytes())

        def finished(module, arguments, output) -> None:
            loss, t = output
            batch = self.batch
            assert self.noted["place"] == batch["place"].tolist()
            assert [self.noted["step"]] * len(loss) == batch["step"].tolist()
            line = {
                **self.noted,
                "rank": rank,
                "index": batch["index"].tolist(),
                "t": t.tolist(),
                "loss": loss.tolist(),
                "masks": [mask.hexdigest()[:16] for mask in self.masks],
            }
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            if trap is not None:
                trap.passing(f"step/{line['step'] + 1}")

        objective.coupling = coupling
        network.register_forward_pre_hook(seen)
        for module in network.modules():
            if isinstance(module, KeyedDropout):
                module.register_forward_hook(dropped)
        objective.register_forward_hook(finished)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batch = batch

    def on_validation_batch_end(self, *_) -> None:
        if trap is not None:
            trap.passing("validation")


class Double(Callback):
    """Trains in float64, in which rounding is 10⁹ times smaller than in float32."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.network.double()
        encode = pl_module.codec.encode
        pl_module.codec.encode = lambda images, noise=None: encode(images, noise).double()


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(
    config: dict[str, Any], *, ranks: int = 1, environment: dict[str, str] | None = None, **trap_at: Any
) -> list[Any]:
    """Begin or go on with the job of a config, as so many processes; returns them.

    What they print goes to <run>.out. With several ranks, they are started as torchrun would.
    """
    port = free_port() if ranks > 1 else 0
    processes = [
        warm.Process(target=_work, args=(config, rank, ranks, port, environment, trap_at if rank == 0 else None))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _work(
    config: dict[str, Any],
    rank: int,
    ranks: int,
    port: int,
    environment: dict[str, str] | None,
    trap_at: dict[str, Any] | None,
) -> None:
    global trap
    output = os.open(f"{config['run']}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgid(0, 0)  # with the workers of its loaders, which outlive it for some seconds
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | (environment or {})
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as in a process that nobody forked
    sys.argv = ["train.py"]
    if ranks > 1:
        shape = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {key: str(value) for key, value in shape.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    import killing  # the module that the config names: `_work` may be a copy of another name

    from denoiselab.app.train import train

    if trap_at:
        killing.trap = Trap(config["run"], **trap_at)
        sys.addaudithook(killing.trap.audit)
    try:
        train(config, CHOICES, [])
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)  # at once: what a process does at its end is not under test


def wait(processes: list[Any], timeout: float = 120) -> list[int]:
    """The exit codes, −9 of one that was killed; the other ranks are then killed as well, as a batch system does it."""
    try:
        for process in processes:
            process.join(timeout)
            if process.exitcode != 0:
                break
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join(timeout)


def seen(file: Path) -> dict[tuple[int, int], Counter[str]]:
    """(step, first place of a micro-batch) → what was seen there, and how often: one line if each execution saw the same."""
    found: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for line in file.read_text().splitlines():
        note = json.loads(line)
        found[note["step"], note["place"][0]][line] += 1
    return found


def by_place(file: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(step, place) → what that sample was; the last word, if a step was made several times."""
    keys = ("index", "t", "loss", "label", "noise", "masks")
    found = {}
    for line in file.read_text().splitlines():
        note = json.loads(line)
        for i, place in enumerate(note["place"]):
            found[note["step"], place] = {key: note[key][i] for key in keys}
    return found


def unlike(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of plain data and tensors differ; tensors by a single bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{path}/{key} is in one only" for key in a.keys() ^ b.keys()]
        return keys + [line for key in a.keys() & b.keys() for line in unlike(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in unlike(*pair, f"{path}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [f"{path}: tensors"]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a} and {b}"]


def end_of(run: Path) -> dict[str, Any]:
    """All that a run has come to: its last checkpoint, its rows, numbers and pictures, without names, times and speeds."""
    checkpoint = load_checkpoint(newest_checkpoint(run))
    del checkpoint["config"]["run"], checkpoint["config"]["callbacks"]["recorder"]
    del checkpoint["loops"]["fit_loop"][
        "epoch_loop.val_loop.batch_progress"
    ]  # Lightning's count, begun anew by each start
    with (run / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if "second" not in key} for row in csv.DictReader(file)]
    summary = json.loads((run / "summary.json").read_text())
    del summary["losses"]["train/images_per_second"]
    lines = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    best = run / "checkpoints" / "best.json"
    return {
        "checkpoint": checkpoint,
        "trace": (run / "trace.csv").read_text(),
        "metrics": rows,
        "numbers": lines,
        "pictures": {path.name: path.read_bytes() for path in (run / "samples").glob("*")},
        "best": json.loads(best.read_text()) if best.exists() else None,
        "kept": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "summary": {key: value for key, value in summary.items() if "second" not in key},
    }
