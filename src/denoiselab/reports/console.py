"""What a person sees on the terminal: the closing table of a run and of a measurement."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from denoiselab.evaluation.collect import ranks
from denoiselab.evaluation.records import Number, protocol_id


def numbers_table(numbers: Sequence[Number]) -> Table:
    """Each number with its interval, the same quantity of real test images, and the id of its protocol."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    intervals = any(number.interval is not None for number in numbers)
    if intervals:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("real", justify="right")
    table.add_column("protocol", style="dim", no_wrap=True)
    for number in numbers:
        digits = min(5, decimals([number.value]))
        cells = [f"{number.value:.{digits}f}"]
        if intervals:
            cells.append("–" if number.interval is None else show_interval(number.interval, max(0, digits - 1)))
        floor = number.floor
        cells.append("–" if floor is None else f"{floor:.{min(5, decimals([floor]))}f}")
        table.add_row(number.name, *cells, protocol_id(number.protocol))
    return table


def decimals(values: Iterable[float]) -> int:
    """How many decimals give the largest of some values four significant digits, at most eight."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 4 if largest == 0 else min(8, max(0, 3 - math.floor(math.log10(largest))))


def show_interval(interval: tuple[float, float], digits: int, sign: str = "") -> str:
    """Both ends in brackets; `sign` "+" shows the sign of positive ones too."""
    return f"[{interval[0]:{sign}.{digits}f}, {interval[1]:{sign}.{digits}f}]"


def protocol_lines(numbers: Iterable[Number]) -> list[str]:
    """How numbers were made, a line for each distinct way; the settings of a measure are in its protocol alone."""
    return [text for text in dict.fromkeys(_protocol_line(number.protocol) for number in numbers) if text]


def _protocol_line(protocol: dict[str, Any]) -> str:
    known = {key: value for key, value in protocol.items() if value is not None}
    parts: list[str] = []
    if "count" in known:
        kind = f"samples ({known['class_balance']})" if "class_balance" in known else "real images"
        parts.append(f"{known['count']:,} {kind}")
    if "sampler" in known:
        spent = f"about {known['nfe_spent']:.1f} NFE" if "nfe_spent" in known else "as many NFE as it needs"
        cost = f"{known['nfe']:g} NFE" if "nfe" in known else spent
        parts.append(f"{_class_name(known['sampler'])} {cost}")
    if "guidance" in known:
        guide, scale = _class_name(known["guidance"]), known["guidance"].get("scale")
        shown = guide if scale is None else f"{guide} at scale {scale:g}"
        parts.append("no guidance" if guide == "unguided" else shown)
    if "weights" in known:
        parts.append(f"{known['weights']} weights" + (f" at step {known['step']:,}" if "step" in known else ""))
    for key, form in (("extractor", "{} features"), ("reference", "against {}")):
        if key in known:
            parts.append(" ".join([form.format(known[key]), str(known.get(f"{key}_hash", ""))[:8]]).strip())
    if "reference_count" in known:
        parts[-1] += f" ({known['reference_count']:,} images)"
    return ", ".join(parts)


def _class_name(node: dict[str, Any]) -> str:
    return str(node.get("_target_", "?")).rpartition(".")[2]


def sampler_line(sampler: object, nfe: int | None) -> str:
    """A sampler and what a sample of it costs."""
    return f"{type(sampler).__name__}, {'as many NFE as it needs' if nfe is None else f'{nfe} NFE'}"


def time_line(seconds: dict[str, float]) -> str:
    """Where the time of a measurement went; the share of the statistics is of network, features and statistics."""
    whole = sum(seconds.get(name, 0.0) for name in ("network", "features", "statistics"))
    share = f" ({seconds.get('statistics', 0.0) / whole:.1%})" if whole else ""
    return ", ".join(
        f"{name} {seconds[name]:,.1f} s{share if name == 'statistics' else ''}"
        for name in ("network", "features", "statistics", "intervals", "reference")
        if name in seconds
    )


def print_results(console: Console, facts: dict[str, Any], numbers: Sequence[Number]) -> None:
    """The closing page of a job."""
    console.print()
    width = max(map(len, facts)) + 2
    for key, value in facts.items():  # paths stay in one piece, so that they can be copied
        console.print(f"[bold]{key:<{width}}[/bold]{escape(str(value))}", soft_wrap=True, highlight=False)
    for weights in dict.fromkeys(number.protocol.get("weights") for number in numbers):
        some = [number for number in numbers if number.protocol.get("weights") == weights]
        console.print(numbers_table(some))
        for text in protocol_lines(some):
            console.print(Padding(Text(f"protocol: {text}", style="dim"), (0, 1)))


@contextmanager
def progress(total: int, unit: str, *, share: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show on rank 0 how far all ranks are: a bar on a terminal; elsewhere, as in a batch system's log, some lines.

    Rank 0 takes the others to be as fast as itself, so nobody waits to be counted.

    Args:
        total: how many there are to do, over all ranks.
        unit: of what, in the plural.
        share: how many of them are this rank's; None: an even part.

    Yields:
        A function to be told how many were just finished on this rank.
    """
    rank, size = ranks()
    if rank != 0 or total == 0:
        yield lambda count: None
        return
    mine, done, began = share or -(-total // size), 0, time.monotonic()
    console = Console(stderr=True) if sys.stderr.isatty() else Console()
    with (_bar if console.is_terminal else _lines)(console, total, unit) as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            finished = min(total, round(total * done / mine))
            show(finished, finished / max(time.monotonic() - began, 1e-9))

        yield advance


@contextmanager
def _bar(console: Console, total: int, unit: str) -> Iterator[Callable[[int, float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console) as bar:
        task = bar.add_task(unit, total=total, rate="")
        yield lambda finished, rate: bar.update(task, completed=finished, rate=f"{rate:,.1f} {unit}/s")


@contextmanager
def _lines(console: Console, total: int, unit: str) -> Iterator[Callable[[int, float], None]]:
    began = when = time.monotonic()
    printed = 0

    def show(finished: int, rate: float) -> None:
        """A line each tenth, or sooner: after 30 s at first, in long jobs less and less often; never two in a second."""
        nonlocal printed, when
        now = time.monotonic()
        due = now - when >= 1 and finished - printed >= total / 10
        if due or now - when >= max(30, (now - began) / 20) or printed < finished == total:
            left = timedelta(seconds=round((total - finished) / rate)) if rate else "unknown"
            line = f"{unit} {finished:,}/{total:,} ({finished / total:.0%})  {rate:,.1f} {unit}/s  {left} left"
            console.print(line, highlight=False, soft_wrap=True)
            printed, when = finished, now

    yield show
