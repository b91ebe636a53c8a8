"""train, sample, evaluate, … as functions of a composed config, and their command lines; the only importer of hydra."""

from __future__ import annotations

import os
import re
import sys

from denoiselab.app.compose import command, gather
from denoiselab.app.resume import restore_overrides
from denoiselab.runs.errors import ConfigError

OF_SWEEPS = re.compile(r"[+~]*(hydra[./](sweep|sweeper|launcher)|sweep)(?=[./=]|$)")
SHOWING = ("-c", "--cfg", "-h", "--help", "--hydra-help", "-i", "--info", "--version")  # instead of a run


def train_command() -> None:
    """`denoiselab-train`; what a resumed run was started with need not be typed again."""

    def complete(arguments: list[str]) -> list[str]:
        check_multirun(arguments)
        return restore_overrides([_for_launcher(argument) for argument in arguments])

    command("train", "denoiselab.app.train:train", complete=complete)


def _for_launcher(argument: str) -> str:
    """What people are used to type of a sweep, as our launchers have it."""
    key, _, value = argument.partition("=")
    return {"--dry-run": "hydra.launcher.dry_run=true", "hydra.sweep.dir": f"hydra.launcher.folder={value}"}.get(
        key, argument
    )


def check_multirun(arguments: list[str]) -> None:
    """See to it that what is about a sweep is not said of a single run, which would begin here and now.

    Raises:
        ConfigError: otherwise.
    """
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    if flags & {"-m", "--multirun", *SHOWING} or "hydra.mode=MULTIRUN" in arguments:
        return
    for argument in arguments:
        if argument == "--dry-run" or OF_SWEEPS.match(argument):
            raise ConfigError(f"{argument}: needs -m; without anything that varies, that is a sweep of one job")


def sweep_command() -> None:
    """`denoiselab-sweep`; what to do and the folder may stand alone."""
    alone = [a for a in sys.argv[1:] if not a.startswith("-") and ("=" not in a or os.path.exists(a))]
    quoted = [argument.replace("'", r"\'") for argument in alone]
    named = [f"{key}='{word}'" for key, word in zip(("action", "folder"), quoted, strict=False)]
    sys.argv[1:] = [*named, *alone[2:], *(argument for argument in sys.argv[1:] if argument not in alone)]
    command("sweep", "denoiselab.app.sweep:sweep")


def sample_command() -> None:
    """`denoiselab-sample`."""
    command("sample", "denoiselab.app.sample:sample")


def evaluate_command() -> None:
    """`denoiselab-evaluate`."""
    command("evaluate", "denoiselab.app.evaluate:evaluate")


def certify_command() -> None:
    """`denoiselab-certify`."""
    command("certify", "denoiselab.app.certify:certify")


def convert_command() -> None:
    """`denoiselab-convert`."""
    command("convert", "denoiselab.app.convert:convert")


def compare_command() -> None:
    """`denoiselab-compare`; run folders may stand alone among its arguments."""
    sys.argv[1:] = gather(sys.argv[1:], "runs")
    command("compare", "denoiselab.app.compare:compare")


def report_command() -> None:
    """`denoiselab-report`; run folders may stand alone among its arguments."""
    sys.argv[1:] = gather(sys.argv[1:], "runs")
    command("report", "denoiselab.app.report:report")


def study_command() -> None:
    """`denoiselab-study`."""
    command("study", "denoiselab.app.study:study")


def frontier_command() -> None:
    """`denoiselab-frontier`."""
    command("frontier", "denoiselab.app.frontier:frontier")


def prefetch_command() -> None:
    """`denoiselab-prefetch`."""
    command("prefetch", "denoiselab.app.prefetch:prefetch")


def replay_command() -> None:
    """`denoiselab-replay`."""
    command("replay", "denoiselab.app.replay:replay")


def sync_command() -> None:
    """`denoiselab-sync`; run folders and sweeps may stand alone among its arguments."""
    sys.argv[1:] = gather(sys.argv[1:], "runs")
    command("sync", "denoiselab.app.sync:sync")


def dashboard_command() -> None:
    """`denoiselab-dashboard`; a sweep or run folders may stand alone among its arguments."""
    sys.argv[1:] = gather(sys.argv[1:], "runs")
    command("dashboard", "denoiselab.app.dashboard:dashboard")
