"""From a command line to a plain config, and from a mistake to one line.

Nothing heavy is imported here: `--help` and `--cfg job` answer before torch is needed. Mistakes of the user end as one line
on stderr and exit code 2, before anything is created; HYDRA_FULL_ERROR=1 shows the traceback as well.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from denoiselab.runs.errors import ConfigError, RankError


def config_folder() -> Path:
    """The folder of YAML files: inside an installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "conf", package.parents[1] / "conf") if path.is_dir())


def command(config_name: str, task: str) -> None:
    """Compose the config of the command line and hand it to a task as plain data; exits if something is wrong.

    Exit codes: 1 if the work failed, 2 for a mistake in the config.

    Args:
        config_name: of the primary config.
        task: "module:function" of (config, choice of each group, overrides); imported after composition.
    """
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints several lines and exits with 1 itself

    jobs: list[tuple[Any, ...] | Exception] = []

    def compose(config: DictConfig) -> None:
        """Keep the job for later: Hydra would add lines of its own to any error raised in here."""
        context = HydraConfig.get()
        choices = {str(group): str(choice) for group, choice in context.runtime.choices.items()}
        try:
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            jobs.append((plain, choices, list(context.overrides.task)))
        except OmegaConfBaseException as error:
            jobs.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(compose)()
        for job in jobs:  # several with --multirun
            if isinstance(job, Exception):
                raise job
        for job in jobs:
            assert isinstance(job, tuple)
            get_method(task.replace(":", "."))(*job)
        return
    except (HydraException, OmegaConfBaseException) as error:
        message, code = f"config error: {composition_message(error, sys.argv[1:])}", 2
    except ConfigError as error:
        message, code = f"config error: {' '.join(str(error).split())}", 2
    except RankError as error:
        message, code = f"error: {error}", 1
    if traceback_wanted:
        traceback.print_exc()
    print(message, file=sys.stderr)
    sys.exit(code)


def composition_message(error: Exception, arguments: list[str]) -> str:
    """What Hydra or OmegaConf found wrong, in one line with the key, the value and what is allowed.

    Args:
        error: as raised by composition or resolution.
        arguments: of the command line, to quote what was typed.
    """
    chain: list[Any] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: must have the form key=value"
    options, missing = getattr(error, "options", None), getattr(error, "missing_cfg_file", None)
    if options and missing:
        group, _, choice = str(missing).rpartition("/")
        return f"{group}={choice}: must be one of {', '.join(options)}"
    for link in chain:
        key, parent = getattr(link, "full_key", None), getattr(link, "parent_node", None)
        if key and "not in struct" in str(link):
            typed = next((a for a in arguments if a.split("=")[0] == key), str(key))
            allowed = sorted(str(k) for k in parent) if parent is not None else []
            close = difflib.get_close_matches(str(key).rpartition(".")[2], allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"{typed}: no such key{hint} (allowed: {', '.join(allowed)})"
    lines = [str(link).strip().splitlines()[0] for link in chain if str(link).strip()]
    key = getattr(chain[-1], "full_key", None)
    text = re.sub(r"\s+", " ", " ".join(dict.fromkeys(lines))) or type(error).__name__
    return f"{key}: {text}" if key and str(key) not in text else text
