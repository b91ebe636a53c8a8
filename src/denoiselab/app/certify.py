"""`denoiselab-certify`: every sampler, path and prediction in conf/, measured against exact answers.

A new sampler, path or prediction is certified by its YAML being there.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console

from denoiselab.app.compose import config_folder
from denoiselab.app.nodes import check_keys, make_node
from denoiselab.reports.certificate import Curve, Row, certify_predictions, certify_sampler, error_curves
from denoiselab.reports.certificate_pages import plot_curves, print_rows, write_rows
from denoiselab.runs.errors import ConfigError
from denoiselab.training.trainer import free_cores

CERTIFY_KEYS: dict[str, Any] = {
    "samplers": list[str] | None,
    "paths": list[str] | None,
    "output": str | None,
    "processes": int | None,
}
PLOTTED = ("cosine", "rectified_flow", "variance_exploding")  # paths of the plot of error against NFE
IMAGE_SIDE = 512  # for paths that are shifted by resolution

Nodes = dict[str, dict[str, Any]]


def certify(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Measure, print the table, write it with the plot; exit code 1 if a row is outside its bound.

    Raises:
        ConfigError: if a sampler or path is asked for that is not there.
    """
    check_keys(options, CERTIFY_KEYS)
    if options["processes"] is not None and options["processes"] < 1:
        raise ConfigError(f"processes={options['processes']}: must be at least 1")
    started = time.perf_counter()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        samplers = _nodes("sampler", options["samplers"], "samplers")
        paths = _nodes("objective/path", options["paths"], "paths")
        predictions = _nodes("objective/prediction", None, "predictions")
    rows: list[Row] = []
    curves: list[Curve] = []
    console = Console()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options["processes"] or free_cores(), mp_context=spawn) as pool:
        jobs = [pool.submit(_certify_path, name, node, samplers, predictions) for name, node in paths.items()]
        for count, job in enumerate(as_completed(jobs), 1):
            some_rows, some_curves = job.result()
            rows += some_rows
            curves += some_curves
            print(f"{some_rows[0].path} ({count} of {len(jobs)} paths)", file=sys.stderr)
    rows.sort(key=lambda row: (row.subject, list(paths).index(row.path)))
    print_rows(console, rows)
    if options["output"] is not None:
        folder = Path(options["output"])
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(rows, folder)
        if curves:
            plot_curves(sorted(curves), folder)
        console.print(f"written to {folder}/", highlight=False)
    outside = [row for row in rows if not row.inside]
    console.print(f"{len(rows)} rows, {len(outside)} outside their bounds, {time.perf_counter() - started:.0f} s")
    if outside:
        sys.exit(1)


def _nodes(group: str, wanted: list[str] | None, key: str) -> Nodes:
    """The config of each choice of a group, or of the wanted ones."""
    names = sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))
    for name in wanted or []:
        if name not in names:
            raise ConfigError(f"{key}={name}: must be among {', '.join(names)}")
    return {name: _compose(group, name) for name in wanted or names}


def _compose(group: str, name: str) -> dict[str, Any]:
    config = compose("train", overrides=[f"{group}={name}", f"datamodule.resolution={IMAGE_SIDE}"])
    return OmegaConf.to_container(OmegaConf.select(config, group.replace("/", ".")), resolve=True)  # type: ignore[return-value]


def _certify_path(on: str, node: dict[str, Any], samplers: Nodes, predictions: Nodes) -> tuple[list[Row], list[Curve]]:
    """Everything on one path; the work of one process."""
    torch.set_num_threads(1)
    path = make_node(node, "objective.path")
    built = {name: make_node(sampler, "sampler") for name, sampler in samplers.items()}
    rows = certify_predictions({name: make_node(p, "prediction") for name, p in predictions.items()}, {on: path})
    for name, sampler in built.items():
        rows += certify_sampler(name, sampler, on, path)
    return rows, error_curves(built, on, path) if on in PLOTTED else []
