"""The frontier as a terminal table, a page, a CSV file and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from denoiselab.reports.frontier import COSTS, Frontier, Point, higher_is_better
from denoiselab.runs.files import MOST_JSON_BYTES, read_small

WORDS, MARKS = ("sampler", "asked", "metric", "note"), ("front_nfe", "front_seconds")
NUMBERS = ("scale", "nfe", "seconds", "value", "low", "high", "real", "count")  # of a record
TABLE, FIGURE, PAGE = "table.csv", "frontier.png", "README.md"


def _rows(frontier: Frontier) -> list[list[str]]:
    """The table with its heading; points in the order of samplers and scales, each with its fronts."""
    fronts = {cost: frontier.front(cost) for cost in COSTS}
    rows = [["front", "sampler", "scale", "NFE", "ms/image", frontier.metric, "95 %", "note"]]
    for point in frontier.points:
        marks = ", ".join(cost for cost, front in fronts.items() if point in front)
        value = f"{point.value:.4g}" if not point.pruned else ""
        interval = "" if point.pruned or point.interval is None else "{:.4g} – {:.4g}".format(*point.interval)
        note = f"pruned at n={point.count} ({point.value:.3g})" if point.pruned else ""
        nfe = f"{point.nfe:g}" if point.nfe == int(point.nfe) else f"{point.nfe:.1f}"
        note = note or (f"asked: {point.budget}" if point.budget != nfe else "")
        rows.append(
            [marks, point.sampler, f"{point.scale:g}", nfe, f"{1000 * point.seconds:.3g}", value, interval, note]
        )
    return rows


def _left_out(frontier: Frontier) -> list[str]:
    """A line for each reason why something was skipped."""
    reasons: dict[str, list[str]] = {}
    for skip in frontier.skipped:
        reasons.setdefault(skip.reason, []).append(f"{skip.sampler} at scale {skip.scale:g} ({skip.budget})")
    return [f"skipped, {reason}: {', '.join(which)}" for reason, which in reasons.items()]


def print_frontier(console: Console, frontier: Frontier) -> None:
    """The table; points on a front are bold, pruned ones dim."""
    console = Console(file=console.file, width=max(console.width, 120))
    heading, *rows = _rows(frontier)
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(heading):
        table.add_column(name, justify="right" if 2 <= i <= 6 else "left", no_wrap=i < 7)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] else "dim" if not row[5] else None)
    console.print(table)
    for line in _left_out(frontier):
        console.print(line, markup=False, highlight=False)


def records(frontier: Frontier) -> list[dict[str, Any]]:
    """Every point and every skipped one as a flat record with the same keys; seconds are per image."""
    fronts = {name: frontier.front(cost) for name, cost in (("front_nfe", "NFE"), ("front_seconds", "s"))}
    rows: list[dict[str, Any]] = []
    for point in frontier.points:
        low, high = point.interval or (None, None)
        rows.append(
            {
                "sampler": point.sampler,
                "scale": point.scale,
                "asked": point.budget,
                "nfe": point.nfe,
                "seconds": point.seconds,
                "metric": frontier.metric,
                "value": point.value,
                "low": low,
                "high": high,
                "real": point.floor,
                "count": point.count,
                **{name: point in front for name, front in fronts.items()},
                "note": "pruned" if point.pruned else "",
            }
        )
    for skip in frontier.skipped:
        empty = dict.fromkeys(rows[0]) if rows else {}
        facts = {"sampler": skip.sampler, "scale": skip.scale, "asked": skip.budget, "metric": frontier.metric}
        rows.append(empty | facts | {"note": f"skipped: {skip.reason}"})
    return rows


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a table.csv, with numbers for numbers; those of other keys or values are left out.

    Args:
        file: that `write_frontier` wrote, maybe somebody else's.

    Raises:
        FileNotFoundError: if there is none.
        ConfigError: if it cannot be read.
    """
    found: list[dict[str, Any]] = []
    for row in csv.DictReader(io.StringIO(read_small(file, MOST_JSON_BYTES).decode(errors="replace"))):
        try:
            numbers = {key: float(row[key]) if row[key] else None for key in NUMBERS}
            marks = {key: row[key] == "True" for key in MARKS}
            found.append({key: row[key] or "" for key in WORDS} | numbers | marks)
        except (KeyError, TypeError, ValueError):
            continue
    return found


def write_frontier(frontier: Frontier, folder: Path) -> None:
    """table.csv, frontier.png and README.md."""
    rows = records(frontier)
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot_frontier(frontier, folder / FIGURE)
    (folder / PAGE).write_text(_page(frontier))


def _page(frontier: Frontier) -> str:
    heading, *rows = _rows(frontier)
    best = "larger" if higher_is_better(frontier.metric) else "smaller"
    lines = ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * 2 + ["---:"] * 5 + ["---"], *rows)]
    facts = [f"- {name}: {value}" for name, value in frontier.facts.items()]
    return "\n".join(
        [
            f"# {frontier.metric} against cost",
            "",
            *facts,
            "",
            f"A point is on a front (*NFE*, *s*) if none of as much or less cost is better; {best} is better. Seconds are of "
            "the network and the sampler on this machine alone and are not compared between machines.",
            "",
            f"![{frontier.metric} against network evaluations and seconds]({FIGURE})",
            "",
            *lines,
            *(f"\n{line[0].upper()}{line[1:]}." for line in _left_out(frontier)),
            "",
        ]
    )


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
FRONT: dict[str, Any] = {"color": "#1a1a1a", "alpha": 0.22, "linewidth": 4, "solid_joinstyle": "round"}
RING: dict[str, Any] = {"markeredgecolor": "#1a1a1a", "markeredgewidth": 1.3, "markersize": 7.5}
FLOOR: dict[str, Any] = {"color": "#707070", "linewidth": 1, "linestyle": (0, (2, 2))}
AXES = {"NFE": (1, "network evaluations per image, guidance included"), "s": (1000, "milliseconds per image")}


def plot_frontier(frontier: Frontier, file: Path) -> None:
    """Two panels, quality against evaluations and against seconds; a colour for each sampler, a marker for each scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    points = [point for point in frontier.measured if math.isfinite(point.value)]
    samplers = list(dict.fromkeys(point.sampler for point in points))
    scales = sorted({point.scale for point in points})
    colors = dict(zip(samplers, COLORS * len(samplers), strict=False))
    looks: dict[float, dict[str, Any]] = {
        scale: {"marker": marker, "linestyle": dash}
        for scale, marker, dash in zip(scales, MARKERS * len(scales), DASHES * len(scales), strict=False)
    }
    floor = next((point.floor for point in points if point.floor is not None), None)
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, (unit, label)) in zip(axes, AXES.items(), strict=True):
        if floor is not None:
            axis.axhline(floor, zorder=0, **FLOOR)
        _panel(axis, points, frontier.front(name), _in_units(COSTS[name], unit), colors, looks)
        axis.set_xlabel(label, fontsize=9)
    axes[0].xaxis.set_major_locator(LogLocator(base=2))  # budgets are usually doubled
    linear = _quality_axis(axes[0], points, floor)
    axes[0].set_ylabel(
        frontier.metric if linear is None else f"{frontier.metric} (linear below {linear:g})", fontsize=10
    )
    gap = Line2D([], [], linestyle="", label="")
    grey: dict[str, Any] = {"color": "#505050", "markersize": 4.5, "linewidth": 1.2}
    handles = [Line2D([], [], color=colors[name], linewidth=2, label=name) for name in samplers]
    if len(scales) > 1:
        handles += [gap, *(Line2D([], [], label=f"scale {scale:g}", **grey, **looks[scale]) for scale in scales)]
    handles += [gap, Line2D([], [], label="Pareto front", **FRONT)]
    handles += [Line2D([], [], linestyle="", marker="o", markerfacecolor="none", label="on the front", **RING)]
    if floor is not None:
        handles += [Line2D([], [], label="real test images", **FLOOR)]
    axes[1].legend(handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    about = {"fontsize": 8, "color": "#606060", "x": 0.01, "ha": "left"}
    figure.suptitle(" · ".join(str(frontier.facts[k]) for k in ("run", "weights") if k in frontier.facts), **about)
    figure.supxlabel(" · ".join(str(frontier.facts[k]) for k in ("samples", "device") if k in frontier.facts), **about)
    figure.savefig(file, dpi=160)


def _quality_axis(axis: Any, points: Sequence[Point], floor: float | None) -> float | None:
    """A logarithmic axis, linear around zero where an extrapolated distance, its interval or its floor is not positive.

    Returns:
        Below which value it is linear, if it is.
    """
    shown = [value for point in points for value in (point.value, *(point.interval or ()))]
    shown += [] if floor is None else [floor]
    lowest, highest, linear = min(shown, default=1.0), max(shown, default=1.0), None
    round_numbers = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
    if lowest > 0:
        axis.set_yscale("log")
        ticks = [tick for tick in round_numbers if lowest / 2 < tick < 2 * highest]
    else:
        linear = next(number for number in round_numbers if number >= max(-lowest, 1e-4 * highest))
        axis.set_yscale("symlog", linthresh=linear, linscale=0.6)
        axis.set_ylim(bottom=-linear if lowest < -linear / 2 else -linear / 2)
        ticks = [0.0, *(tick for tick in round_numbers if linear <= tick < 2 * highest)]
    if len(ticks) > 12:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith(("0", "1"))]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    return linear


def _in_units(cost: Callable[[Point], float], unit: int) -> Callable[[Point], float]:
    return lambda point: unit * cost(point)


def _panel(
    axis: Any,
    points: Sequence[Point],
    front: Sequence[Point],
    cost: Callable[[Point], float],
    colors: dict[str, str],
    looks: dict[float, dict[str, Any]],
) -> None:
    """One panel: a line for each sampler and scale, and the front as a broad staircase below them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lines: dict[tuple[str, float], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.nfe):
        lines.setdefault((point.sampler, point.scale), []).append(point)
    if front:
        steps = [*map(cost, front), 1.15 * max(map(cost, points))]
        axis.step(steps, [*(point.value for point in front), front[-1].value], where="post", zorder=1, **FRONT)
    for (sampler, scale), line in lines.items():
        color = colors[sampler]
        shown = [*map(cost, line)], [point.value for point in line]
        axis.plot(*shown, color=color, markersize=4.5, linewidth=1.2, zorder=3, **looks[scale])
        for point in line:
            if point.interval is not None:
                axis.vlines(cost(point), *point.interval, color=color, linewidth=1, alpha=0.55, zorder=2)
    for point in front:
        face = {"marker": looks[point.scale]["marker"], "markerfacecolor": colors[point.sampler]}
        axis.plot(cost(point), point.value, zorder=4, **face, **RING)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(which="major", color="#ececec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
