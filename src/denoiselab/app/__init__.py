"""train, sample, evaluate, … as functions of a composed config, and their command lines; the only importer of hydra."""

from __future__ import annotations

from denoiselab.app.compose import command


def train_command() -> None:
    """`denoiselab-train`."""
    command("train", "denoiselab.app.train:train")


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
