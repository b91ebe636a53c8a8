"""The code that the jobs of a sweep run: as it was when the sweep began, whatever is edited while they wait.

The copy is kept in the cache of whoever started the sweep, named by its content, and not in the folder of the sweep: that may
come from somebody else, and nothing in it may bring code along.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

from denoiselab.runs.errors import ConfigError
from denoiselab.runs.folder import GIT, cache_folder, git_state

PACKAGE = Path(__file__).parents[1]
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_of_now() -> dict[str, Path]:
    """What is copied: the places in the copy, and where each is now."""
    found = {"src/denoiselab": PACKAGE, "src/hydra_plugins/denoiselab": PACKAGE.parent / "hydra_plugins" / "denoiselab"}
    checkout = PACKAGE.parents[1] / "conf"
    return found | ({} if (PACKAGE / "conf").is_dir() else {"conf": checkout})


def freeze() -> str:
    """Copy the code of now to the cache, unless it is there; the name of the copy.

    Raises:
        ConfigError: if it cannot be written.
    """
    git = json.dumps(git_state(PACKAGE), indent=2)
    digest = hashlib.sha256(git.encode())
    for place, source in code_of_now().items():
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{place}/{path.relative_to(source)}\0".encode() + path.read_bytes())
    name = digest.hexdigest()[:16]
    home = cache_folder() / "code" / name
    if not home.is_dir():
        beside = home.with_name(f".{name}.{uuid.uuid4().hex}")
        try:
            for place, source in code_of_now().items():
                shutil.copytree(source, beside / place, ignore=SKIPPED)
            (beside / "src" / "denoiselab" / GIT).write_text(git)
            os.replace(beside, home)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not home.is_dir():  # another sweep may have been faster
                raise ConfigError(f"{home.parent}: the code cannot be copied there ({error.strerror})") from error
    return name


def frozen(name: str) -> Path:
    """What goes in front of PYTHONPATH for the code of a name.

    Raises:
        ConfigError: if there is no such copy.
    """
    home = cache_folder() / "code" / name
    if not name.isalnum() or not home.is_dir():
        raise ConfigError(f"code={name}: is not in {home.parent}; code=now takes the code as it is now")
    return home / "src"
