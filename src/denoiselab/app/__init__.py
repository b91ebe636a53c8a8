"""train, sample, evaluate, … as functions of a composed config, and their command lines; the only importer of hydra."""

from __future__ import annotations

import sys

from denoiselab.app.compose import command, gather
from denoiselab.app.resume import restore_overrides


def train_command() -> None:
    """`denoiselab-train`; what a resumed run was started with need not be typed again."""
    command("train", "denoiselab.app.train:train", complete=restore_overrides)


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
