"""`denoiselab-frontier`: quality against cost for one trained run, over samplers, budgets and guidance scales.

Each way of sampling is a point. A measured point is a line of points.jsonl, so that a command that was interrupted goes
on, and one with a larger grid measures only what is new. The folder's name is a hash of what all its points share
(weights, metrics, data), never of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console

from denoiselab.app.build import check_metrics, make_parts
from denoiselab.app.compose import config_folder
from denoiselab.app.frontier_points import Bench, Way, check_shared, device_name, key_of, read_lines, shared_by_all
from denoiselab.app.nodes import check_keys, make_node
from denoiselab.app.sample import run_folder
from denoiselab.app.trained import Trained, load_trained
from denoiselab.diffusion.noise import hash64
from denoiselab.evaluation.metrics import MIN_COUNT
from denoiselab.reports.console import print_results
from denoiselab.reports.frontier import Frontier, Skipped, higher_is_better
from denoiselab.reports.frontier_pages import FIGURE, print_frontier, records, write_frontier
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import check_own, prepare_folder
from denoiselab.training.trainer import free_cores
from denoiselab.training.wandb_run import start_wandb

FRONTIER_KEYS: dict[str, Any] = {
    "run": str | None,
    "checkpoint": str | None,
    "runs": str,
    "weights": str | None,
    "samplers": list[str],
    "nfe": list[int],
    "tolerances": list[float],
    "scales": list[float],
    "count": int,
    "metric": str | None,
    "halving": bool,
    "seed": int,
    "batch_size": int,
    "threads": int | None,
    "output": str | None,
    "device": str,
    "trust": list[str],
}


def frontier(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Measure every point that is not measured yet, print the table, and write it with a page and a figure.

    Raises:
        ConfigError: if the run or an option is wrong; nothing is written then.
    """
    check_keys(options, FRONTIER_KEYS)
    _check(options, choices)
    trained = load_trained(options | {"nfe": None, "steps": None}, ("metrics", "datamodule"))
    _check_measurable(trained)
    ways, skipped = _ways(options, trained)
    if not ways:
        raise ConfigError(f"samplers={options['samplers']}: none of them can be used; {skipped[0].reason}")
    shared = shared_by_all(trained, options["batch_size"])
    run = run_folder(trained.checkpoint).resolve()
    folder = Path(options["output"]) if options["output"] else run / "frontier" / key_of(shared)
    if not options["output"]:
        check_own(run, "frontier")
    lines = read_lines(folder)
    torch.set_num_threads(options["threads"] or (lines[0]["shared"].get("threads") if lines else None) or free_cores())
    shared |= {"device": device_name(trained.device), "threads": torch.get_num_threads()}
    try:
        check_shared(lines, shared)
    except ValueError as error:
        raise ConfigError(f"output={folder}: {error}; choose another folder, or remove this one") from error
    bench = Bench(trained, folder, shared, lines, count=options["count"], metric=options["metric"])
    first = bench.first(ways)
    try:
        prepare_folder(folder)
    except ValueError as error:
        raise ConfigError(f"output: {error}") from error
    facts = {
        "run": run.name,
        "weights": f"{trained.weights}, step {trained.step}",
        "samples": f"{options['count']} images a point, seed {trained.parts.metrics.seed}",
        "guidance": f"{choices['guidance']} (scale 1: none)",
        "device": f"{shared['device']}, threads: {shared['threads']}, images a batch: {options['batch_size']}",
    }
    own = f"{run.name}-frontier-{hash64(str(folder.resolve())) & 0xFFFFFFFF:08x}"
    with _dashboard(options["logger"], choices["logger"], folder, own, shared | {"command": overrides}) as show:
        bench.keep(first)
        name, points, failed = bench.measure(ways, halving=options["halving"])
        result = Frontier(name, points, [*skipped, *failed], facts)
        write_frontier(result, folder)
        show(result)
    print_results(Console(), result.facts | {"output": folder}, [])
    print_frontier(Console(), result)


def _check(options: dict[str, Any], choices: dict[str, str]) -> None:
    """Refuse what is wrong whatever the run is."""
    for key in ("samplers", "nfe", "tolerances", "scales"):
        if not options[key]:
            raise ConfigError(f"{key}=[]: must name at least one")
    names = sorted(file.stem for file in (config_folder() / "sampler").glob("*.yaml"))
    for name in options["samplers"]:
        if name not in names:
            raise ConfigError(f"samplers={name}: must be among {', '.join(names)}")
    for budget in options["nfe"]:
        if budget < 1:
            raise ConfigError(f"nfe={budget}: each must be at least 1")
    for tolerance in options["tolerances"]:
        if not 0 < tolerance < 1:
            raise ConfigError(f"tolerances={tolerance}: each must be in (0, 1)")
    if options["count"] < MIN_COUNT:
        raise ConfigError(f"count={options['count']}: must be at least {MIN_COUNT}")
    if options["threads"] is not None and options["threads"] < 1:
        raise ConfigError(f"threads={options['threads']}: must be at least 1, or null")
    if options["metric"] is not None:
        try:
            higher_is_better(options["metric"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if choices["logger"] not in ("wandb", "none"):
        raise ConfigError(f"logger={choices['logger']}: must be wandb or none")
    if choices["guidance"] == "none" and options["scales"] != [1]:
        raise ConfigError(f"scales={options['scales']}: must be [1] with guidance=none")
    if choices["guidance"] != "none" and "scale" not in options["guidance"]:
        raise ConfigError(f"guidance={choices['guidance']}: must be none, or one with a scale of its own, such as cfg")


def _check_measurable(trained: Trained) -> None:
    if not trained.parts.metrics.extractors:
        raise ConfigError("metrics=none: nothing to measure; name metrics=digits or metrics=fid")
    try:
        trained.parts.data.check()
    except ValueError as error:
        raise ConfigError(f"datamodule.{error}") from error
    check_metrics(trained.config, trained.parts.metrics, trained.parts.data)


def _ways(options: dict[str, Any], trained: Trained) -> tuple[list[Way], list[Skipped]]:
    """What can be measured, sampler by sampler and scale by scale, each once; and what cannot, with the reason.

    Raises:
        ConfigError: if the run cannot be guided by one of the scales.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        nodes = {name: _compose("sampler", name, trained) for name in dict.fromkeys(options["samplers"])}
        none, easiest = _compose("guidance", "none", trained), _compose("sampler", "euler", trained)
    guided = {}
    for scale in dict.fromkeys(map(float, options["scales"])):
        guidance = options["guidance"] | ({"scale": scale} if "scale" in options["guidance"] else {})
        config = trained.config | {"guidance": guidance, "sampler": easiest | {"nfe": None, "steps": 1}}
        try:
            denoiser = make_parts(config, options["trust"]).guidance(trained.parts.objective.denoiser(trained.network))
        except ConfigError as error:
            raise ConfigError(str(error).replace("guidance.scale=", "scales=")) from error
        # At scale 1 most do nothing: the number is then that of no guidance, also for compare.
        guided[scale] = denoiser, none if getattr(denoiser, "idle", False) else guidance
    ways: dict[str, Way] = {}
    skipped: list[Skipped] = []
    for name, node in nodes.items():
        for scale, (denoiser, guidance) in guided.items():
            for budget, changes in _budgets(node, options):
                try:
                    sampler = make_node(node | changes, "sampler")
                    nfe = sampler.plan(denoiser)[1]
                except ValueError as error:
                    skipped.append(Skipped(name, scale, budget, str(error)))
                    continue
                exact = node | changes | ({"nfe": nfe} if "nfe" in node else {})  # what two budgets come to is one way
                way = Way(name, scale, budget, {"sampler": exact, "guidance": guidance}, nfe, sampler, denoiser)
                known = ways.get(way.key)
                ways[way.key] = way if known is None else replace(known, budget=f"{known.budget}, {budget}")
    return list(ways.values()), skipped


def _compose(group: str, name: str, trained: Trained) -> dict[str, Any]:
    """The config of a choice, for the data of the run."""
    config = compose("train", overrides=[f"{group}={name}"])
    OmegaConf.update(config, "datamodule", trained.config["datamodule"], merge=False, force_add=True)
    return OmegaConf.to_container(config[group], resolve=True)  # type: ignore[return-value]


def _budgets(node: dict[str, Any], options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What is asked of a sampler, in words and as changes of its node: network evaluations, or tolerances."""
    if "nfe" in node:
        return [(str(nfe), {"nfe": nfe, "steps": None}) for nfe in dict.fromkeys(options["nfe"])]
    both = {key for key in ("rtol", "atol") if key in node}
    return [(f"tolerance {t:g}", dict.fromkeys(sorted(both), t)) for t in dict.fromkeys(options["tolerances"])]


@contextmanager
def _dashboard(
    node: dict[str, Any], choice: str, folder: Path, name: str, config: dict[str, Any]
) -> Iterator[Callable[[Frontier], None]]:
    """A W&B run of the folder, which takes the result and ends with its true status; with logger=none, nothing.

    Args:
        node: of the logger.
        choice: "wandb" or "none".
        folder: where the W&B run's files go.
        name: its name and id: a folder has one W&B run, however often the command goes on.
        config: shown in the dashboard.
    """
    if choice == "none":
        yield lambda result: None
        return
    import wandb

    keys = ("project", "entity", "mode", "tags", "notes")
    given = {key: node.get(key) for key in keys}
    run = start_wandb(folder, name, "frontier", name=name, resume="allow", config=config, **given)

    def show(result: Frontier) -> None:
        rows = records(result)
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({"frontier/table": table, "frontier/figure": wandb.Image(str(folder / FIGURE))})

    failed = True
    try:
        yield show
        failed = False
    finally:
        run.finish(exit_code=int(failed))
