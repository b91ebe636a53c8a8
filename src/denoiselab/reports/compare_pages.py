"""A comparison of runs as a terminal table, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from denoiselab.evaluation.records import protocol_id
from denoiselab.reports.compare import Comparison, Row
from denoiselab.reports.console import decimals, protocol_lines, show_interval
from denoiselab.reports.measured_runs import MeasuredRun

LETTERS = "ᵃᵇᶜᵈ"
REAL = "real test images"


def print_comparison(console: Console, found: Comparison) -> None:
    """The table, in as many parts as the width asks for, and below it what the intervals are and where the runs lie."""
    left = list(found.columns)
    while left:
        count = len(left)
        while count > 1 and _width(_part(found, left[:count], console.width), console) > console.width:
            count -= 1
        console.print(_part(found, left[:count], console.width))
        left = left[count:]
    for line in captions(found):
        console.print(Padding(Text(line, style="dim"), (0, 1)))
    longest = max(len(row.name) for row in found.rows)
    console.print()
    for row in found.rows:
        for i, run in enumerate(row.runs):  # paths stay in one piece, so that they can be copied
            name = row.name if i == 0 else ""
            console.print(Text.assemble(" ", (f"{name:<{longest}}", "bold"), f"  {_where(run)}"), soft_wrap=True)


def _width(table: Table, console: Console) -> int:
    """How wide a table would like to be."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _part(found: Comparison, columns: Sequence[str], width: int) -> Table:
    """Some of the columns, each value above its interval, then the differences to the first row."""
    table = Table(box=box.SIMPLE_HEAD)
    repeated = any(len(row.runs) > 1 for row in found.rows)
    table.add_column("", min_width=12, max_width=max(16, width // 3))
    if repeated:
        table.add_column("n", justify="right")
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)  # a name is no markup
    lead = [""] if repeated else []
    if any(column in found.floors for column in columns):
        table.add_row(REAL, *lead, *(_floor(found, column) for column in columns), style="dim")
    for row in found.rows:
        lead = [str(len(row.runs))] if repeated else []
        table.add_row(Text(row.name), *lead, *(_stacked(_cell(found, row, c)) for c in columns))
    if len(found.rows) > 1:
        table.add_section()
        table.add_row(Text("less the first row", style="italic"))
        for row in found.rows[1:]:
            lead = [""] if repeated else []
            table.add_row(Text(row.name), *lead, *(_stacked(_less(found, row, c)) for c in columns))
    return table


class Shown(NamedTuple):
    """What stands in one place of the table."""

    value: str
    interval: str = ""
    clear: bool = False


def _stacked(shown: Shown) -> Text:
    below = [("\n" + shown.interval, "dim")] if shown.interval else []
    return Text.assemble((shown.value, "bold" if shown.clear else ""), *below)


def _floor(found: Comparison, column: str) -> str:
    if (floor := found.floors.get(column)) is None:
        return ""
    return f"{floor:.{max(_digits(found, column), min(4, decimals([floor])))}f}"  # small ones are not cut to 0.0


def _cell(found: Comparison, row: Row, column: str) -> Shown:
    if (cell := row.cells.get(column)) is None:
        return Shown("–")
    digits = _digits(found, column)
    return Shown(f"{cell.value:.{digits}f}", show_interval(cell.interval, digits) if cell.interval else "")


def _less(found: Comparison, row: Row, column: str) -> Shown:
    """A difference with its sign, a star if its interval excludes zero, and a letter for how it was paired."""
    if (less := row.differences.get(column)) is None:
        return Shown("–")
    largest = decimals(r.differences[column].value for r in found.rows[1:] if column in r.differences)
    digits = min(_digits(found, column) + 2, max(_digits(found, column), largest - 2))  # two digits of small ones
    star, letter = " *" if less.clear else "", _letters(found).get(less.how, "")
    interval = show_interval(less.interval, digits, "+") if less.interval else ""
    return Shown(f"{less.value:+.{digits}f}{star}{letter}".replace("-", "−"), interval.replace("-", "−"), less.clear)


def _digits(found: Comparison, column: str) -> int:
    return decimals(row.cells[column].value for row in found.rows if column in row.cells)


def _letters(found: Comparison) -> dict[str, str]:
    """How the differences were paired, in the order in which they come; letters only where there are several ways."""
    ways = list(dict.fromkeys(d.how for row in found.rows for d in row.differences.values() if d.interval))
    return dict(zip(ways, LETTERS if len(ways) > 1 else [""], strict=False))


def captions(found: Comparison) -> list[str]:
    """What stands below the table: what the intervals know, how differences were paired, the protocols."""
    sampled = "of one run over the draw of its samples, not over training seeds"
    repeated = "of n > 1 runs Student's t over their training seeds, "
    cells = [cell for row in found.rows for cell in row.cells.values() if cell.interval]
    lines: list[str] = []
    if cells:
        lines.append(f"95 % intervals: {repeated if any(cell.n > 1 for cell in cells) else ''}{sampled}.")
    if ways := _letters(found):
        told = "; ".join(f"{letter} {way}".strip() for way, letter in ways.items())
        lines.append(f"Differences to the first row: {told}. * the interval excludes 0.")
    lines += [f"Protocol: {text}." for text in protocol_lines(found.numbers())]
    return lines + [f"Note: {note}." for note in found.notes]


def _where(run: MeasuredRun) -> str:
    return f"{run.path}{'' if run.seed is None else f' (seed {run.seed})'}"


# --- files ---


def as_markdown(found: Comparison) -> str:
    """One table of values and one of differences, with everything that stands below them."""

    def line(name: str, n: str, cells: Iterable[Shown]) -> list[str]:
        return [name, n, *(f"{shown.value} {shown.interval}".strip() for shown in cells)]

    values = [[REAL, "", *(_floor(found, c) for c in found.columns)]] if found.floors else []
    values += [line(row.name, str(len(row.runs)), (_cell(found, row, c) for c in found.columns)) for row in found.rows]
    less = [line(row.name, "", (_less(found, row, c) for c in found.columns)) for row in found.rows[1:]]
    pages = [_grid(["", "n", *found.columns], values)]
    if less:
        pages.append(_grid([f"less {found.rows[0].name}", "", *found.columns], less))
    pages += captions(found)
    pages.append("\n".join(f"- {row.name}: {', '.join(map(_where, row.runs))}" for row in found.rows))
    return "\n\n".join(pages).replace("*", r"\*") + "\n"


def _grid(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in heading[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, marks, *lines])


def records(found: Comparison) -> list[dict[str, Any]]:
    """A plain record for each number of the table."""
    flat: list[dict[str, Any]] = []
    for row in found.rows:
        for column, cell in row.cells.items():
            less = row.differences.get(column)
            numbers = [run.numbers[column] for run in row.runs if column in run.numbers]
            low, high = cell.interval or (None, None)
            less_low, less_high = (less.interval if less else None) or (None, None)
            flat.append(
                {
                    "row": row.name,
                    "metric": column,
                    "n": cell.n,
                    "value": cell.value,
                    "low": low,
                    "high": high,
                    "real": found.floors.get(column),
                    "difference": less.value if less else None,
                    "difference_low": less_low,
                    "difference_high": less_high,
                    "difference_is": less.how if less else None,
                    "protocol_id": " ".join(dict.fromkeys(protocol_id(number.protocol) for number in numbers)),
                    "runs": " ".join(str(run.path) for run in row.runs if column in run.numbers),
                }
            )
    return flat


def as_csv(found: Comparison) -> str:
    """A line for each number of the table."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records(found)[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(found))
    return file.getvalue()


def as_json(found: Comparison) -> str:
    """The records with the protocols that they name, and the notes."""
    protocols = {protocol_id(number.protocol): number.protocol for number in found.numbers()}
    whole = {"numbers": records(found), "protocols": protocols, "captions": captions(found)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
