"""From a command line to a plain config, and from a mistake to one line.

Nothing heavy is imported here: `--help` and `--cfg job` answer before torch is needed. Mistakes of the user end as one line
on stderr and exit code 2, before anything is created; HYDRA_FULL_ERROR=1 shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from denoiselab.runs.errors import ConfigError, RankError, Stopped
from denoiselab.runs.secrets import (
    MASK,
    argument_secrets,
    changed_keys,
    environment_secrets,
    is_secret_name,
    redact,
    redact_arguments,
    redact_terminal,
    redact_yaml,
)
from denoiselab.runs.signals import held_back, stopping

Composition = tuple[dict[str, Any], dict[str, str], list[str]]  # config, choice of each group, overrides
KEPT = 500  # characters at either end of a long message


def config_folder() -> Path:
    """The folder of YAML files: inside an installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "conf", package.parents[1] / "conf") if path.is_dir())


def command(config_name: str, task: str, complete: Callable[[list[str]], list[str]] = list) -> None:
    """Compose the config of the command line and hand it to a task as plain data; exits if something is wrong.

    Exit codes: 1 if the work failed, 2 for a mistake in the config, 75 if a signal stopped it and it can go on, 130 after
    Ctrl-C.

    Args:
        config_name: of the primary config.
        task: "module:function" of (config, choice of each group, overrides); imported after composition.
        complete: makes the arguments to compose of those that were typed.
    """
    with answering():
        composed = _compose(config_name, complete)
        for job in composed.jobs:  # several with --multirun and Hydra's own launcher
            with held_back():  # libraries answer an interrupted import in ways of their own
                run = get_method(task.replace(":", "."))
            run(*job)
        for conclude in composed.closing:
            conclude()


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Inside, signals stop what is done, and errors end the program with one line and their exit code; see `command`."""
    try:
        with stopping():
            yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except (ConfigError, RankError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        mistake = isinstance(error, ConfigError)
        print(f"config error: {one_line(str(error))}" if mistake else f"error: {cause(error)}", file=sys.stderr)
        sys.exit(2 if mistake else 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            path = str(error.filename)  # which nobody but the user can have thought of
            given = (a for a in sys.argv[1:] if (value := a.partition("=")[2].strip("'\"")) and value in path)
            print(f"config error: {one_line(f'{next(given, path)}: {error.strerror}')}", file=sys.stderr)
            sys.exit(2)
        traceback.print_exc()
        print(f"error: {cause(error)}", file=sys.stderr)
        sys.exit(1)


class Composed:
    """What Hydra composes, kept for later: it would add lines of its own to any error raised while it works.

    A launcher of ours, which works while Hydra does, finds everything that it needs here: it takes the jobs that it has had
    composed, and starts them itself.
    """

    def __init__(self, secrets: list[str]) -> None:
        self.secrets = secrets
        self.jobs: list[Composition] = []
        self.problem: Exception | None = None
        self.hidden: list[str] = []  # keys whose values look like secrets
        self.closing: list[Callable[[], None]] = []  # what is to be said when all jobs are done
        self._terminal, self._environment = sys.stdout, dict(os.environ)

    def __call__(self, config: DictConfig) -> None:
        """Keep the config that Hydra has just composed, without secrets, as plain data."""
        context = HydraConfig.get()
        choices = {str(group): str(choice) for group, choice in context.runtime.choices.items()}
        try:
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            self.problem = self.problem or error
            return
        shown = redact(plain, self.secrets)
        self.hidden.extend(changed_keys(plain, shown))
        self.jobs.append((shown, choices, list(context.overrides.task)))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the terminal and the environment are as they were before Hydra began."""
        during = dict(os.environ)
        with contextlib.redirect_stdout(self._terminal):
            try:
                _set_environment(self._environment)
                yield
            finally:
                _set_environment(during)

    def check(self) -> None:
        """See to it that all could be composed, and say which values have been taken for secrets.

        Raises:
            OmegaConfBaseException: otherwise.
        """
        problem, self.problem = self.problem, None  # a search goes on
        if problem is not None:
            raise problem
        if self.hidden:
            keys = ", ".join(dict.fromkeys(self.hidden))
            print(f"warning: {keys}: looks like a secret, and is {MASK} from here on", file=sys.stderr)
            self.hidden.clear()


def _compose(config_name: str, complete: Callable[[list[str]], list[str]]) -> Composed:
    """The jobs that the command line asks for, or those of a sweep done.

    Raises:
        ConfigError: if it cannot be composed.
    """
    secrets = [*environment_secrets(os.environ), *argument_secrets(sys.argv[1:])]
    redact_terminal(secrets)
    typed = complete(sys.argv[1:])
    sys.argv[1:] = redact_arguments(typed, secrets)  # Hydra, and W&B later, see nothing else
    composed = Composed(secrets)
    composed.hidden = [
        new.partition("=")[0].lstrip("+~") for old, new in zip(typed, sys.argv[1:], strict=True) if old != new
    ]
    before = dict(os.environ)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints several lines and exits with 1 itself
    try:
        with (
            _redacted(),
            tempfile.TemporaryDirectory() as scratch,  # where Hydra writes the multirun.yaml that it insists on
        ):
            OmegaConf.register_new_resolver("scratch", lambda: scratch, replace=True)
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(composed)()
        composed.check()
    except (ConfigError, RankError):
        raise
    except Exception as error:  # Hydra answers odd overrides with errors of any kind
        raise ConfigError(composition_message(error, sys.argv[1:])) from error
    finally:
        _set_environment(before)
    return composed


def _set_environment(environment: dict[str, str]) -> None:
    for key in set(os.environ) - set(environment):
        del os.environ[key]
    os.environ.update(environment)


def cause(error: BaseException) -> str:
    """Why a command failed, in one line."""
    return one_line(str(error) if isinstance(error, ConfigError | RankError) else f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """A message in one line; of what is too long for anybody to read, the beginning and the end."""
    text = " ".join(text.split())
    return text if len(text) <= 2 * KEPT else f"{text[:KEPT]} ... {text[-KEPT:]}"


@contextlib.contextmanager
def _redacted() -> Iterator[None]:
    """Hydra prints configs by itself: what it prints in here is held back until the values of secret keys are gone."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        package = any(is_secret_name(word) for word in sys.argv[1:] if "=" not in word)  # --cfg job -p logger.api_key
        sys.stdout.write(f"{MASK}\n" if package and printed.getvalue() else redact_yaml(printed.getvalue()))


def gather(arguments: list[str], key: str) -> list[str]:
    """Arguments in which those that stand alone, such as paths, have become one list under a key.

    Args:
        arguments: of the command line; a flag keeps the word that follows it, and an existing path may hold a "=".
        key: of the config.
    """
    alone = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if not before.startswith("-")
        and not argument.startswith("-")
        and ("=" not in argument or os.path.exists(argument))
    ]
    quoted = ",".join("'" + argument.replace("'", r"\'") + "'" for argument in alone)
    return [argument for argument in arguments if argument not in alone] + ([f"{key}=[{quoted}]"] if alone else [])


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
        typed = next((a for a in arguments if a.replace("=", "/", 1) == missing), f"{group}={choice}")
        return f"{typed}: must be one of {', '.join(options)}"
    for link in chain:
        key, parent = getattr(link, "full_key", None), getattr(link, "parent_node", None)
        if key and "not in struct" in str(link):
            typed = next((a for a in arguments if a.split("=")[0] == key or a.startswith(f"{key}.")), str(key))
            if typed.startswith(f"{key}.") and (config_folder() / str(key)).is_dir():  # a group that is null here
                return f"{typed}: this command takes the run's own {key}; choose {key}=<name> to change a part of it"
            names = map(str, parent if parent is not None else [])
            allowed = sorted(name for name in names if name != "hydra" and not name.startswith("_"))
            close = difflib.get_close_matches(str(key).rpartition(".")[2], allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close and typed.split("=")[0] == key else ""
            return f"{typed}: no such key{hint} (allowed: {', '.join(allowed) or 'none'})"
    several = re.match(r"Ambiguous value for argument '(.*)'", str(error))
    if several:
        return f"{several[1]}: must be one value; several need -m, and a list is written [a,b]"
    null = next((a for a in arguments if a.endswith("=null")), None)
    if null and "Got NoneType" in str(error):
        return f"{null}: must be a choice of this group, for example one of those that --help lists"
    lines = [str(link).strip().splitlines()[0] for link in chain if str(link).strip()]
    key = next((a for a in arguments if "${" in a), None) or getattr(chain[-1], "full_key", None)
    text = re.sub(r"\s+", " ", " ".join(dict.fromkeys(lines))) or type(error).__name__
    if key and str(key) not in text:
        text = f"{key}: {text}"
    plain = [a for a in arguments if not a.startswith("-")]
    named = any(len(name := a.partition("=")[0].lstrip("+~")) > 1 and name in text for a in plain)
    # Hydra's word alone would say what, not where.
    return text if named or not plain else f"{' '.join(plain)}: {text}"
