"""Who a W&B run is: made at its first start, kept in the run folder, and the same whoever sends the run and whenever.

wandb/identity.json holds what `wandb.init` is told and the config that the dashboard shows; a run that is resumed keeps its
name, group, project and entity, and `denoiselab-sync` reads all of it.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from denoiselab.runs.changes import UNSAID, below
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.files import read_json, write_json
from denoiselab.runs.folder import COMMAND, CONFIG, git_state
from denoiselab.runs.secrets import redact
from denoiselab.runs.sweep_folder import membership
from denoiselab.training.history import surviving

log = logging.getLogger(__name__)
WANDB, IDENTITY = "wandb", "identity.json"
SWEEP_KEY = "sweep_folder"  # of the config; "sweep" is a name of W&B's own
TAGGED = ("datamodule", "backbone", "objective")  # the groups whose choices are tags
MOST_NAME, MOST_TAG = 100, 64  # characters; W&B refuses longer tags


@dataclass(frozen=True)
class Identity:
    """What W&B is told of a run, beside its id.

    Args:
        name: shown in the dashboard.
        group: the sweep that it belongs to.
        tags: each of 1 to 64 characters.
        notes: free text.
        project: None: W&B's own default.
        entity: team or user; None: W&B's own default.
        checkpoints: whether checkpoints are uploaded.
        images: pictures that are sent at most.
        config: shown in the dashboard.
    """

    name: str
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    project: str | None = None
    entity: str | None = None
    checkpoints: bool = False
    images: int = 64
    config: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """Arguments of `wandb.init`."""
        keys = ("name", "group", "tags", "notes", "project", "entity")
        return {key: getattr(self, key) for key in keys}


def identify(run_dir: Path, default: str, *, tags: list[str] | None = None, **options: Any) -> Identity:
    """The identity of a run that starts, kept in its folder.

    Args:
        run_dir: the run folder.
        default: name of a run that has no other.
        tags: beside the choices of data set, backbone and objective.
        options: further fields of the identity.
    """
    config, command = (_dict(run_dir / name) for name in (CONFIG, COMMAND))
    sweep = membership(run_dir)
    known = None
    try:
        known = read_identity(run_dir)
    except ConfigError as error:
        log.warning("%s; made anew", error)
    if known is not None:
        name, group = known.name, known.group
        for key in ("project", "entity"):
            was = getattr(known, key)
            if options.get(key) != was:
                log.warning("logger.%s=%s: a W&B run stays where it is, %s=%s", key, options.get(key), key, was)
            options[key] = was
    else:
        group, name = sweep or (None, display_name(config.get("name"), _texts(command.get("overrides")), default))
    said = command.get("choices")
    choices = {str(k): v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}
    chosen = [choices[group] for group in TAGGED if group in choices]
    facts: dict[str, Any] = {"git": git_facts(), "choices": choices}
    if sweep is not None:
        facts |= {SWEEP_KEY: run_dir.parent.name, "job": sweep[1]}  # the folder's name is the sweep's alone
    identity = Identity(
        name=name,
        group=group,
        tags=tidy_tags([*(tags or []), *chosen]),
        config=(known.config if known else {}) | facts,
        **options,
    )
    with surviving(run_dir / WANDB / IDENTITY):
        write_identity(run_dir, identity)
    return identity


def display_name(name: str | None, overrides: list[str], default: str) -> str:
    """The name of a single run: its own, else what it overrides, else a default.

    Args:
        name: of the config.
        overrides: as on the command line; those that say where a run is and how it is logged say nothing of what it is.
        default: if there is nothing to say.
    """
    told = [o for o in overrides if not below(o.lstrip("+~").partition("=")[0], (*UNSAID, "logger", "hydra"))]
    return (name or ",".join(told))[:MOST_NAME] or default


def tidy_tags(tags: list[str]) -> list[str]:
    """Tags as W&B takes them: each once, of 1 to 64 characters."""
    return list(dict.fromkeys(tag.strip()[:MOST_TAG] for tag in tags if tag.strip()))


def git_facts() -> dict[str, Any] | None:
    """Commit, branch and whether files have changed since; no remote, whose URL may hold a token, and no diff."""
    state = git_state(Path(__file__).parent)
    return state and {"commit": state["commit"], "branch": state["branch"], "changed": bool(state["changed_files"])}


def write_identity(run_dir: Path, identity: Identity) -> None:
    """Keep it, without secrets."""
    (run_dir / WANDB).mkdir(exist_ok=True)
    write_json(run_dir / WANDB / IDENTITY, asdict(identity))


def add_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Keep more of what the dashboard shows."""
    known = read_identity(run_dir)
    if known is not None:
        write_identity(run_dir, replace(known, config=known.config | config))


def read_identity(run_dir: Path) -> Identity | None:
    """The kept identity, without secrets; None if the run has none.

    Raises:
        ConfigError: if it is damaged.
    """
    path = run_dir / WANDB / IDENTITY
    try:
        said = redact(read_json(path))
    except FileNotFoundError:
        return None
    kinds: dict[str, Any] = {
        "name": str,
        "group": str | None,
        "tags": list,
        "notes": str | None,
        "project": str | None,
        "entity": str | None,
        "checkpoints": bool,
        "images": int,
        "config": dict,
    }
    if not isinstance(said, dict) or said.keys() != kinds.keys():
        raise ConfigError(f"{path}: must hold {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(said[key], kind):
            raise ConfigError(f"{path}: {key} is of another kind")
    return Identity(**said | {"tags": tidy_tags(_texts(said["tags"]))})


def last_step(run_dir: Path) -> int | None:
    """The step at which a run is to end; None if its config does not say."""
    trainer = _dict(run_dir / CONFIG).get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if isinstance(steps, int) else None


def _dict(path: Path) -> dict[str, Any]:
    try:
        said = read_json(path)
    except FileNotFoundError:
        return {}
    return said if isinstance(said, dict) else {}


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
