"""From plain data to one HTML file.

The data enters at one place, as JSON in which no character can end a script; the scripts show all of it as text. The
page's policy lets a browser run these scripts by their hashes and nothing else, and forbids it every connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from denoiselab.training.checkpoint_io import write_atomically

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "data",
    "parts",
    "state",
    "plots",
    "table",
    "curves",
    "pictures",
    "parallel",
    "frontier",
    "records",
    "differences",
    "main",
)


def write_page(data: dict[str, Any], file: Path) -> int:
    """Write the page, complete or not at all; its size in bytes.

    Args:
        data: that `gather` gave.
        file: in a folder that exists.
    """
    content = page(data).encode()
    write_atomically(file, lambda stream: stream.write(content))
    return len(content)


def page(data: dict[str, Any]) -> str:
    """The whole document."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), own_script()]
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    parts = {
        "POLICY": policy(scripts),
        "STYLE": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "DATA": as_json(data),
        "PLOTLY": scripts[0],
        "SCRIPT": scripts[1],
    }
    return "".join(_filled(template, parts))


def _filled(template: str, parts: dict[str, str]) -> Iterator[str]:
    """The template with its places taken, once each: what was put in is not looked at again."""
    for i, piece in enumerate(template.split("@@")):
        yield parts[piece] if i % 2 else piece


def own_script() -> str:
    """The scripts of assets/ as one, with a scope of its own."""
    texts = [(ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return "\n".join(['(() => {\n"use strict";', *texts, "start();\n})();"])


def policy(scripts: list[str]) -> str:
    """What a browser may do with the page: run these scripts, show embedded pictures, and nothing over the network."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def as_json(data: Any) -> str:
    """JSON in ASCII for a script element: nothing in it can end the element or begin a comment.

    Raises:
        ValueError: if a number in it is not finite.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
