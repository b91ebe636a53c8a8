"""The certificate as a terminal table, a page, a CSV file and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from denoiselab.reports.certificate import Curve, Row

READ = ("conversion", "refused")
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


PREFACE = """# Certificate

Made by `make certify`. Everything is measured in float64 on densities whose best denoiser is known in closed form.

- **order**: the slope of the error in the probability-flow ODE of a mixture of Gaussians under halved steps, between two
  noise levels inside the path, from exact starting values; bound: the claimed order ± 0.15. **as shipped**: with the
  start that the YAML has; bound: at least the claimed order − 0.15.
- **moments**: error of mean and standard deviation on Gaussian data after 120 steps, relative to the standard deviation,
  propagated exactly (every step is affine), noise included; **rate**: its order in the number of steps.
- **NFE/step**: network evaluations a step, or in all for an adaptive solver. **10 NFE**: distance from the exact solution
  of the ODE with at most ten evaluations (root mean square, of the data's own) on the grid of the YAML, or on Karras's
  where the path refuses that one; an adaptive solver takes as many as it needs.
- **conversion**: largest error of x0 and ε read back from a prediction, over the whole path; *refused* pairs cannot be
  read to eleven digits somewhere on it and are config errors.

The plot shows the error in the ODE's solution against evaluations between σ/α = 80 and 0.002, on the same grids. The grey
lines have slopes 1 to 4."""


def show(row: Row | None) -> str:
    """A value as it stands in a table; one outside its bound is marked."""
    if row is None:
        return ""
    if row.check == "refused" and row.inside:
        return "refused"
    small = row.check in ("conversion", "refused", "moments", "few steps")
    text = f"{row.value:.1e}" if small else f"{row.value:.2f}" if row.check != "nfe" else f"{row.value:g}"
    return text if row.inside else f"{text} OUTSIDE"


def _tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """The tables with their headings: predictions by path, a line for each sampler on each path, one for each sampler."""
    by = {(row.subject, row.path, row.check): row for row in rows}
    paths = list(dict.fromkeys(row.path for row in rows))
    predictions = list(dict.fromkeys(row.subject for row in rows if row.check in READ))
    samplers = list(dict.fromkeys(row.subject for row in rows if row.check not in READ))
    pairs = [["path", *predictions]]
    pairs += [
        [path, *(show(next(filter(None, (by.get((name, path, c)) for c in READ)))) for name in predictions)]
        for path in paths
    ]
    lines = [["sampler", "path", *COLUMNS.values()]]
    lines += [[name, path, *(show(by.get((name, path, c))) for c in COLUMNS)] for name in samplers for path in paths]
    summary = [["sampler", *COLUMNS.values()]]
    for name in samplers:
        summary.append([name])
        for check in COLUMNS:
            found = sorted((r for r in rows if (r.subject, r.check) == (name, check)), key=lambda r: r.value)
            ends = list(dict.fromkeys(map(show, (found[0], found[-1])))) if found else []
            summary[-1].append(" – ".join(ends))
    return {
        "Conversion error": pairs,
        "Samplers, path by path": lines,
        "Samplers, least and most over the paths": summary,
    }


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Everything, in full width also where the output is no terminal."""
    console = Console(file=console.file, width=max(console.width, 126))
    for title, content in _tables(rows).items():
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for i, heading in enumerate(content[0]):
            table.add_column(heading, justify="left" if i < 1 or heading == "path" else "right", no_wrap=True)
        for before, line in pairwise(content):
            if content[0][1] == "path" and line[0] != before[0] != "sampler":
                table.add_section()
            table.add_row(*line)
        console.print(table)


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """table.csv, a line for each row with its bound, and README.md, the tables with the plot."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), "inside"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | {"inside": row.inside} for row in rows)
    outside = sum(not row.inside for row in rows)
    pages = [
        PREFACE,
        f"{len(rows)} rows, {outside} outside their bounds.",
        "![Error against evaluations](error_against_nfe.png)",
    ]
    for title, content in reversed(_tables(rows).items()):
        marks = ["---" if i == 0 or heading == "path" else "---:" for i, heading in enumerate(content[0])]
        lines = [content[0], marks, *content[1:]]
        pages.append("\n".join([f"## {title}", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    (folder / "README.md").write_text("\n\n".join(pages) + "\n")


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
