"""A study as a folder: README.md with claims, figures, tables and protocol; table.csv; protocol.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoiselab.reports.studies.claims import Claim
from denoiselab.reports.studies.study import Findings
from denoiselab.runs.files import write_json

TABLE, PROTOCOL, PAGE = "table.csv", "protocol.json", "README.md"
RULE = """\
The rule, fixed before anything is measured: a claim says that some differences are positive, and their intervals hold
simultaneously at 95 % (Bonferroni). *Refuted*: at least one interval lies below zero. *Confirmed*: all lie above
zero. *Undecided*: anything else. It is in `reports/studies/claims.py`."""


def write_page(findings: Findings, folder: Path, command: str, settings: dict[str, Any]) -> None:
    """Write the files.

    Args:
        findings: of a study.
        folder: that is there.
        command: which made it.
        settings: of the study, plain values.
    """
    write_json(folder / PROTOCOL, findings.facts | {"settings": settings})
    for picture in findings.pictures:
        picture.figure.savefig(folder / picture.file, dpi=160)
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(findings.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(findings.rows)
    pages = [
        f"# {findings.title}",
        f"Made by `{command}`.",
        "## Claims",
        markdown([["claim", "on", "verdict", "intervals", "furthest below"], *map(_line, findings.claims)]),
        RULE,
        *(f"![{findings.title}]({p.file})\n\n*{' '.join(p.caption.split())}*" for p in findings.pictures),
        "## How it was measured",
        findings.about,
        *(f"## {title}\n\n{markdown(table)}" for title, table in findings.tables.items()),
        f"All numbers are in [{TABLE}]({TABLE}).",
        "## Protocol",
        "\n".join(f"- {key}: `{json.dumps(value)}`" for key, value in findings.facts.items()),
        f"With every setting: [{PROTOCOL}]({PROTOCOL}).",
    ]
    (folder / PAGE).write_text("\n\n".join(pages) + "\n")


def _line(claim: Claim) -> list[str]:
    return [claim.text, claim.on, f"**{claim.verdict}**", claim.counts, claim.worst]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first line its headings."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    """The verdicts on the terminal."""
    console = Console(file=console.file, width=max(console.width, 126))
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("claim", "on", "verdict", "intervals"):
        table.add_column(heading)
    for claim in claims:
        table.add_row(*map(escape, (claim.text, claim.on, claim.verdict, claim.counts)))
    console.print(table)
