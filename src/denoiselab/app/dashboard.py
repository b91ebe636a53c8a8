"""`denoiselab-dashboard`: a W&B workspace and report of a sweep or project, as a file, and at W&B when logged in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from denoiselab.app.sync import folders_of
from denoiselab.runs.checks import check_value
from denoiselab.runs.errors import ConfigError, RankError
from denoiselab.runs.files import prepare_folder, read_json, write_json
from denoiselab.runs.sweep_folder import SWEEP

DASHBOARD_KEYS: dict[str, Any] = {
    "runs": list[str],
    "project": str | None,
    "entity": str | None,
    "metric": str | None,
    "title": str | None,
    "output": str | None,
    "save": bool,
}


def dashboard(options: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Write the specs of the workspace and the report, and save both at W&B if somebody is logged in.

    Raises:
        ConfigError: if an option is wrong, or a package is missing.
        RankError: if W&B does not take them.
    """
    for key, annotation in DASHBOARD_KEYS.items():
        check_value(options[key], annotation, key)
    try:
        import denoiselab.reports.dashboard_pages as pages
    except ModuleNotFoundError as error:
        raise ConfigError("dashboard: needs wandb-workspaces; pip install 'denoiselab[dashboard]'") from error
    from denoiselab.reports.dashboard import where_logged

    runs = list(dict.fromkeys(run for given in options["runs"] for run in folders_of(given)))
    project, entity = where_logged(runs)
    project, entity = options["project"] or project, options["entity"] or entity
    if project is None:
        raise ConfigError("project=null: name a W&B project, or run folders as in dashboard.py sweeps/a")
    board = _board(options, runs, project)
    output = _output(options, runs)
    known = _saved_before(output)
    account = _account() if options["save"] else None
    where = (entity or account or "", project)
    workspace, report = pages.workspace(board, *where), pages.report(board, *where)
    content: dict[str, Any] = {
        "entity": entity or account,
        "project": project,
        "workspace": pages.spec_of(workspace),
        "report": pages.spec_of(report),
        "saved": known,
    }
    _write(output, content)
    panels = sum(len(section.panels) for section in board.sections)
    print(f"{output}: {panels} panels of {board.sweep or board.title}, as a workspace and as a report")
    if board.ids is not None and (missing := len(runs) - len(board.ids)):
        print(f"{missing} of {len(runs)} runs have never been at W&B: sync.py sends them, then call this again")
    if account is None:
        print("not saved at W&B: " + ("not logged in, or offline; wandb login" if options["save"] else "save=false"))
        return
    try:
        for name, made in (("workspace", workspace), ("report", report)):
            known[name] = pages.save(made, known.get(name, {}))
            print(f"{name}: {known[name]['url']}")
    except Exception as error:  # the library raises plain ones
        raise RankError(f"W&B has not taken the dashboard: {' '.join(str(error).split())}") from error
    finally:
        _write(output, content)  # what was saved is known, so that the next call writes over it


def _board(options: dict[str, Any], runs: list[Path], project: str) -> Any:
    from denoiselab.reports.dashboard import (
        COLUMNS,
        choose_metric,
        ids_of,
        is_falling,
        logged_keys,
        make_board,
        varying_columns,
    )

    logged = logged_keys(runs)
    sweep = next((run.parent for run in runs if (run.parent / SWEEP).exists()), None)
    if len({run.parent for run in runs}) != 1:
        sweep = None
    ids = ids_of(runs) if runs and sweep is None else None
    metric, falling = choose_metric(runs, sweep, logged)
    if options["metric"] is not None:
        metric = options["metric"]
        if metric not in logged:
            near = [key for key in logged if key.endswith(f"/{metric}")]
            if len(near) != 1 and runs:
                numbers = ", ".join(
                    key for key in logged if key.startswith(("metrics", "val/")) and key.count("/") == 1
                )
                raise ConfigError(f"metric={metric}: must be among {numbers}")
            metric = near[0] if near else metric
        falling = is_falling(metric)
    columns = varying_columns(runs) if runs else list(COLUMNS)
    title = options["title"] or (sweep.name if sweep is not None else f"{project}: runs")
    name = None if sweep is None else sweep.name
    return make_board(title, name, logged, metric, columns, falling=falling, ids=ids)


def _output(options: dict[str, Any], runs: list[Path]) -> Path:
    """The file, in the folder of the sweep or run if nothing else is said."""
    if options["output"] is not None:
        output = Path(options["output"])
        if output.suffix != ".json":
            raise ConfigError(f"output={output}: must be a file that ends in .json")
        return output
    parents = {run.parent for run in runs}
    sweep = next(iter(parents)) if len(parents) == 1 else None
    if sweep is not None and (sweep / SWEEP).exists():
        return sweep / "dashboard.json"
    return Path(f"dashboard-{re.sub('[^A-Za-z0-9_.-]', '-', options['project'] or 'runs')}.json")


def _saved_before(output: Path) -> dict[str, dict[str, str]]:
    """What W&B knows the workspace and the report of an earlier call by."""
    try:
        said = read_json(output)
    except FileNotFoundError:
        return {}
    saved = said.get("saved") if isinstance(said, dict) else None
    found = saved.items() if isinstance(saved, dict) else ()
    return {name: entry for name, entry in found if isinstance(entry, dict) and {"id", "name"} <= entry.keys()}


def _write(output: Path, content: dict[str, Any]) -> None:
    try:
        prepare_folder(output.parent)
        write_json(output, content)
    except (OSError, ValueError) as error:
        raise ConfigError(f"output={output}: {error}") from error


def _account() -> str | None:
    """Where the user's runs go at W&B; None if nobody is logged in, or W&B is switched off."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online" or not wandb.login(prompt=False):
        return None
    try:
        return wandb.Api(timeout=30).default_entity
    except (wandb.errors.Error, ValueError) as error:
        raise RankError(f"W&B cannot be reached: {' '.join(str(error).split())}") from error
