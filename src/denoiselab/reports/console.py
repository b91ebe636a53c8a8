"""What a person sees on the terminal: the closing table of a run and of a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoiselab.evaluation.records import Number


def numbers_table(numbers: Sequence[Number]) -> Table:
    """Each number beside the same quantity of real test images."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("real test images", justify="right")
    for number in numbers:
        floor = "–" if number.floor is None else f"{number.floor:.4f}"
        table.add_row(number.name, f"{number.value:.4f}", floor)
    return table


def sampler_line(sampler: object, nfe: int | None) -> str:
    """A sampler and what a sample of it costs."""
    return f"{type(sampler).__name__}, {'as many NFE as it needs' if nfe is None else f'{nfe} NFE'}"


def print_results(console: Console, facts: dict[str, Any], numbers: Sequence[Number]) -> None:
    """The closing page of a job."""
    console.print()
    width = max(map(len, facts)) + 2
    for key, value in facts.items():  # paths stay in one piece, so that they can be copied
        console.print(f"[bold]{key:<{width}}[/bold]{escape(str(value))}", soft_wrap=True, highlight=False)
    if numbers:
        console.print(numbers_table(numbers))
