"""The figures of the studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from denoiselab.reports.studies.copying import Rate, Strip
    from denoiselab.reports.studies.frequency import Level
    from denoiselab.reports.studies.guidance_scale import Found

GREY, BLUE, ORANGE, GREEN, BLACK = "#8a8a8a", "#0072B2", "#D55E00", "#009E73", "#000000"
THIN: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2, "elinewidth": 0.9}
BOLD: dict[str, Any] = {"markersize": 4, "linewidth": 1.4, "elinewidth": 1.0, "capsize": 2.5}


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def plot_frequency(levels: Sequence[Level], quantity: str) -> Figure:
    """A row of panels for each kind of data, a column for each sampler; lines are bands."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, NullFormatter

    levels = [level for level in levels if level.quantity == quantity]
    kinds, names = (list(dict.fromkeys(getattr(x, key) for x in levels if x.steps)) for key in ("data", "sampler"))
    steps = sorted({level.steps for level in levels if level.steps})
    figure = new_figure(2.05 * len(names) + 1.6, 2.0 * len(kinds) + 0.6)
    axes = figure.subplots(len(kinds), len(names), sharex=True, sharey=True, squeeze=False)
    for row, kind in zip(axes, kinds, strict=True):
        bands = list(dict.fromkeys(level.band for level in levels if level.data == kind))
        shades = [
            matplotlib.colormaps["viridis_r"](0.15 + 0.85 * i / max(len(bands) - 1, 1)) for i in range(len(bands))
        ]
        for axis, name in zip(row, names, strict=True):
            _tidy(axis)
            if quantity == "power":
                axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
            for band, shade in zip(bands, shades, strict=True):
                of_band = [level for level in levels if (level.data, level.band) == (kind, band)]
                curve = [level for level in of_band if level.sampler == name]
                if curve:
                    _curve(axis, [level.steps for level in curve], curve, {"color": shade, "label": f"{band} cycles"})
                for level in of_band:
                    if not level.steps:  # the ODE's solution
                        axis.axhline(level.value, color=shade, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            if not any((level.data, level.sampler) == (kind, name) for level in levels):
                axis.text(0.5, 0.72, "noise of its own:\nno ODE to compare with", **_centred(axis))
        row[0].set_ylabel(f"{kind.replace('_', ' ')}\n{'power, dB' if quantity == 'power' else quantity}", fontsize=9)
        handles, labels = max((axis.get_legend_handles_labels() for axis in row), key=lambda pair: len(pair[0]))
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "handlelength": 1.2}
        row[-1].legend(handles, labels, fontsize=7.5, frameon=False, **place)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("steps", fontsize=9)
    first = axes[0, 0]
    first.set(xscale="log", xticks=steps, xlim=(steps[0] / 1.25, steps[-1] * 1.25))
    if quantity == "power":
        first.set_yscale("symlog", linthresh=0.1, linscale=0.6)
        first.set_yticks([-10, -1, -0.1, 0, 0.1, 1, 10])
        values = [level.value for level in levels]
        first.set_ylim(min(1.5 * min(values), -1), max(1.5 * max(values), 1))
        first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    else:
        first.set_yscale("log")
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    first.xaxis.set_minor_formatter(NullFormatter())
    first.minorticks_off()
    return figure


def _centred(axis: Axes) -> dict[str, Any]:
    return {"transform": axis.transAxes, "ha": "center", "va": "center", "fontsize": 7.5, "color": GREY}


def _curve(axis: Axes, x: Sequence[float], points: Sequence[Any], style: dict[str, Any], unit: float = 1.0) -> None:
    """Values with their intervals."""
    values = [unit * point.value for point in points]
    low = [max(0.0, value - unit * p.interval[0]) for value, p in zip(values, points, strict=True)]
    high = [max(0.0, unit * p.interval[1] - value) for value, p in zip(values, points, strict=True)]
    axis.errorbar(x, values, yerr=[low, high], **THIN | style)


def plot_guidance(found: Sequence[Found]) -> Figure:
    """A row of panels for each data, a column for each measure; lines are the ways to guide."""
    kinds, measures = (list(dict.fromkeys(getattr(f, name) for f in found)) for name in ("data", "measure"))
    figure = new_figure(10.5, 2.7 * len(kinds) + 0.4)
    axes = figure.subplots(len(kinds), len(measures), sharex=True, squeeze=False)
    ways = [way for way in dict.fromkeys(f.guided for f in found) if way != "real"]
    for row, kind in zip(axes, kinds, strict=True):
        for axis, measure in zip(row, measures, strict=True):
            _tidy(axis)
            here = [f for f in found if (f.data, f.measure) == (kind, measure)]
            for way, (colour, marker) in zip(ways, ((BLUE, "o"), (ORANGE, "s")), strict=True):
                curve = [f for f in here if f.guided == way]
                style = BOLD | {"color": colour, "marker": marker, "label": f"guided {way}"}
                _curve(axis, [f.scale for f in curve], curve, style)
            for f in here:
                if f.guided == "real":
                    axis.axhline(f.value, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), label="real", zorder=0)
            axis.set_title(f"{kind}: {measure.replace('_', ' ')}", fontsize=10, loc="left")
            axis.margins(y=0.12)
    scales = sorted({f.scale for f in found if f.guided != "real"})
    for axis in axes[-1]:
        axis.set_xlabel("guidance scale", fontsize=9)
        axis.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes[0, 0].legend(fontsize=8.5, frameon=False, loc="lower right")
    return figure


def plot_copying(rates: Sequence[Rate], strips: Sequence[Strip]) -> Figure:
    """A panel for each space, lines for what is compared; below, samples over the nearest training images."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    styles = {
        "samples, training images": (BLUE, "o", "-"),
        "samples, images held out": (ORANGE, "s", "-"),
        "real images, training images": (GREEN, "^", "-"),
        "ideal denoiser of the training set": (BLACK, "x", "--"),
        "ideal denoiser of the density": (BLUE, "o", "-"),
        "fresh draws": (GREEN, "^", "-"),
    }
    figure = new_figure(11.0, 5.0)
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.1, 1), hspace=0.02)
    upper, lower = halves
    spaces, sizes = list(dict.fromkeys(r.space for r in rates)), sorted({r.size for r in rates})
    axes = upper.subplots(1, len(spaces), sharey=True, squeeze=False)[0]
    for axis, space in zip(axes, spaces, strict=True):
        _tidy(axis)
        here = [rate for rate in rates if rate.space == space]
        for what in dict.fromkeys(rate.what for rate in here):
            colour, marker, line = styles[what]
            curve = [rate for rate in here if rate.what == what]
            style = BOLD | {"color": colour, "marker": marker, "linestyle": line, "label": what}
            _curve(axis, [rate.size for rate in curve], curve, style, unit=100)
        axis.set(xscale="log", xticks=sizes, ylim=(-4, 104))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(space, fontsize=10, loc="left")
        axis.set_xlabel("training images" if space != "exact" else "training points", fontsize=9)
        if axis in (axes[0], axes[-1]):
            axis.legend(fontsize=7.5, frameon=False, loc="upper right", bbox_to_anchor=(1.03, 0.93), handlelength=1.3)
    axes[0].set_ylabel("copies, %", fontsize=9)
    for axis, strip in zip(lower.subplots(1, len(strips), squeeze=False)[0], strips, strict=True):
        axis.imshow(_pairs(strip), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(f"{strip.size:,} images", fontsize=8.5)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def _pairs(strip: Strip) -> Any:
    """The samples in a row over the images nearest to them, as one array (H, W) or (H, W, 3)."""
    import torch

    rows = []
    for images in (strip.samples, strip.nearest):
        framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=128)
        rows.append(torch.cat(list(framed), dim=2))
    grid = torch.cat(rows, dim=1).permute(1, 2, 0)
    return grid.expand(*grid.shape[:2], 1 if grid.shape[2] == 1 else 3).squeeze(-1).numpy()
