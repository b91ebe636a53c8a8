"""The certificate as a terminal table, a page, a CSV file and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from denoiselab.reports.certificate import Curve, Row

COLUMNS = {
    "order": "order",
    "shipped": "as shipped",
    "moments": "moments",
    "rate": "rate",
    "nfe": "NFE/step",
    "few steps": "10 NFE",
}
FAMILIES = {
    "Euler": ("ddim", "euler", "euler_t"),
    "Runge-Kutta": ("heun", "heun_t", "midpoint", "dpm_2", "dpmpp_2s", "rk4"),
    "Adams (ε)": ("ab_2", "ab_3", "lms", "deis_2", "deis_3", "pndm"),
    "Adams (x0)": ("dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3"),
}


def show(row: Row | None) -> str:
    """A value as it stands in a table; one outside its bound is marked."""
    if row is None:
        return ""
    if row.value is None:
        return "refused"
    small = row.check in ("conversion", "moments", "few steps")
    text = f"{row.value:.1e}" if small else f"{row.value:.2f}" if row.check != "nfe" else f"{row.value:g}"
    return text if row.inside else f"{text} OUTSIDE"


def _pivot(rows: Sequence[Row]) -> tuple[list[list[str]], list[list[str]]]:
    """Predictions by path, and one line for each sampler on each path; with their headings."""
    by = {(row.subject, row.path, row.check): row for row in rows}
    paths = list(dict.fromkeys(row.path for row in rows))
    predictions = list(dict.fromkeys(row.subject for row in rows if row.check == "conversion"))
    samplers = list(dict.fromkeys(row.subject for row in rows if row.check != "conversion"))
    pairs = [["path", *predictions]]
    pairs += [[path, *(show(by.get((name, path, "conversion"))) for name in predictions)] for path in paths]
    lines = [["sampler", "path", *COLUMNS.values()]]
    lines += [[name, path, *(show(by.get((name, path, c))) for c in COLUMNS)] for name in samplers for path in paths]
    return pairs, lines


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The whole table, in full width also where the output is no terminal."""
    console = Console(file=console.file, width=max(console.width, 112))
    for title, content in zip(("conversion error", "samplers"), _pivot(rows), strict=True):
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for i, heading in enumerate(content[0]):
            table.add_column(heading, justify="left" if i < 1 or heading == "path" else "right", no_wrap=True)
        previous = ""
        for line in content[1:]:
            if previous not in ("", line[0]) and title == "samplers":
                table.add_section()
            previous = line[0]
            table.add_row(*line)
        console.print(table)


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """table.csv, a line for each row with its bound, and table.md."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), "inside"])
        writer.writeheader()
        writer.writerows(asdict(row) | {"inside": row.inside} for row in rows)
    pages = []
    for title, content in zip(("Conversion error", "Samplers"), _pivot(rows), strict=True):
        marks = ["---" if i == 0 or heading == "path" else "---:" for i, heading in enumerate(content[0])]
        lines = [content[0], marks, *content[1:]]
        pages.append("\n".join([f"## {title}", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    (folder / "table.md").write_text("\n\n".join(pages) + "\n")


def plot_curves(curves: Sequence[Curve], folder: Path) -> None:
    """error_against_nfe.png and .svg: a row of panels for each family of samplers, a column for each path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = list(dict.fromkeys(curve.path for curve in curves))
    known = {name for names in FAMILIES.values() for name in names}
    subjects = {curve.subject for curve in curves}
    all_families = FAMILIES | {"others": tuple(sorted(subjects - known))}
    families = {family: [name for name in names if name in subjects] for family, names in all_families.items()}
    families = {family: names for family, names in families.items() if names}
    figure = Figure(figsize=(3.3 * len(paths) + 1.2, 2.5 * len(families) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(families), len(paths), sharex=True, sharey=True, squeeze=False)
    styles = [
        ("#0072B2", "o"),
        ("#D55E00", "s"),
        ("#009E73", "^"),
        ("#CC79A7", "D"),
        ("#E69F00", "v"),
        ("#000000", "x"),
    ]
    for row, (family, names) in zip(axes, families.items(), strict=True):
        for axis, path in zip(row, paths, strict=True):
            for order in (1, 2, 3, 4):  # slopes to compare with, through one point
                axis.plot([5, 400], [3, 3 * (5 / 400) ** order], color="#d0d0d0", linewidth=0.8, zorder=0)
                end = min(400.0, 5 * (3 / 3e-7) ** (1 / order))
                axis.annotate(str(order), (end, 3 * (5 / end) ** order), fontsize=7, color="#909090", ha="right")
            for name, (color, marker) in zip(names, styles * 9, strict=False):
                curve = next(c for c in curves if (c.path, c.subject) == (path, name))
                axis.plot(curve.nfe, curve.error, color=color, marker=marker, markersize=3, linewidth=1.1, label=name)
            axis.set(xscale="log", yscale="log", xlim=(4, 450), ylim=(1e-7, 10))
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{family}\nerror", fontsize=9)
        row[-1].legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis, path in zip(axes[0], paths, strict=True):
        axis.set_title(path.replace("_", " "), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations", fontsize=9)
    figure.savefig(folder / "error_against_nfe.png", dpi=160)
    figure.savefig(folder / "error_against_nfe.svg")
