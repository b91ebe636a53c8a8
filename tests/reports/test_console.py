from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from denoiselab.evaluation.records import Number
from denoiselab.reports.console import print_results


def printed(facts, numbers, width=80):
    """What a terminal of that width shows, line by line."""
    console = Console(file=io.StringIO(), width=width)
    print_results(console, facts, numbers)
    return console.file.getvalue().splitlines()


NUMBERS = [
    Number("fd_digits_2k", 0.23456, 0.19, {}),
    Number("accuracy", 0.975, 0.99, {}),
    Number("recall_2k", 0.5, None, {}),
]


def test_numbers_stand_beside_their_floors():
    words = [line.split() for line in printed({"run": "x"}, NUMBERS) if line.strip(" ─")]
    rows = {first: rest for first, *rest in words[1:]}
    assert rows["metric"] == ["value", "real", "test", "images"]
    assert rows["fd_digits_2k"] == ["0.2346", "0.1900"]
    assert rows["accuracy"] == ["0.9750", "0.9900"]
    assert rows["recall_2k"] == ["0.5000", "–"]
    assert list(rows) == ["metric", "fd_digits_2k", "accuracy", "recall_2k"]


def test_without_numbers_there_is_no_table():
    assert [line for line in printed({"run": "x"}, []) if line.strip()] == ["run  x"]


def test_a_long_path_stays_on_one_line():
    path = Path("/") / "/".join(f"quite_a_long_folder_name_{i}" for i in range(12)) / "2026-01-01_00-00-00 run"
    lines = printed({"run": path, "status": "finished"}, NUMBERS, width=60)
    assert f"run     {path}" in lines
    assert "status  finished" in lines


def test_brackets_are_no_markup():
    lines = printed({"sampler": "[red]Heun[/red] [1, 2]"}, [])
    assert "sampler  [red]Heun[/red] [1, 2]" in lines


def test_values_are_aligned():
    lines = [line for line in printed({"a": 1, "longer": 22}, []) if line.strip()]
    assert lines == ["a       1", "longer  22"]
