from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from denoiselab.evaluation.records import Number, protocol_id
from denoiselab.reports.console import decimals, print_results, protocol_lines, time_line
from stand_in_runs import number


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
    assert rows["metric"] == ["value", "real", "protocol"]
    assert rows["fd_digits_2k"] == ["0.2346", "0.1900", protocol_id({})]
    assert rows["accuracy"] == ["0.9750", "0.9900", protocol_id({})]
    assert rows["recall_2k"] == ["0.5000", "–", protocol_id({})]
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


INTERVALS = [
    Number("fd_inf_digits_2k", 0.0812, None, {}, interval=(0.07, 0.0925)),
    Number("accuracy_2k", 0.975, 0.99, {}),
]


def test_intervals_have_a_column_where_there_are_any():
    words = [line.split() for line in printed({"run": "x"}, INTERVALS) if line.strip(" ─")]
    rows = {first: rest for first, *rest in words[1:]}
    assert rows["metric"] == ["value", "95", "%", "interval", "real", "protocol"]
    assert rows["fd_inf_digits_2k"] == ["0.08120", "[0.0700,", "0.0925]", "–", protocol_id({})]
    assert rows["accuracy_2k"] == ["0.9750", "–", "0.9900", protocol_id({})]


@pytest.mark.parametrize(
    ("values", "digits"),
    [([0.2346], 4), ([12.34], 2), ([1234.5], 0), ([0.0012, 0.5], 4), ([0.0012], 6), ([0.0], 4), ([math.nan, 2.0], 3)],
)
def test_four_significant_digits_of_the_largest(values, digits):
    assert decimals(values) == digits


def test_each_protocol_is_one_line_below_the_table():
    numbers = [
        number("fd_digits_2k", 0.2),
        number("recall_2k", 0.9, protocol={"measure": {"name": "PrecisionRecall"}}),
        number("fd_digits_500", 0.3, protocol={"count": 500}),
        number("bits_per_dim_100", 5.0),
    ]
    for_bits = {"guidance": numbers[0].protocol["guidance"], "weights": "ema", "step": 1600, "count": 100}
    numbers[3] = replace(numbers[3], protocol=for_bits)
    made = "HeunT 19 NFE, no guidance, ema weights at step 1,600, digits features 8be094e1, against train 21432cfd"
    assert protocol_lines(numbers) == [
        f"2,000 samples (balanced), {made} (1,297 images)",
        f"500 samples (balanced), {made} (1,297 images)",
        "100 real images, no guidance, ema weights at step 1,600",
    ]
    text = " ".join(" ".join(printed({"run": "x"}, numbers)).split())
    assert f"protocol: 2,000 samples (balanced), {made} (1,297 images)" in text


def test_guidance_and_adaptive_solvers_are_told():
    guided = {"_target_": "lab.guidance.CFG", "scale": 2.5}
    (line,) = protocol_lines([number("fid_2k", 1.0, protocol={"guidance": guided, "nfe": None})])
    assert "HeunT as many NFE as it needs, CFG at scale 2.5, ema weights" in line


def test_numbers_of_two_kinds_of_weights_are_two_tables():
    numbers = [number("fd_digits_2k", 0.25), number("fd_digits_2k", 0.75, protocol={"weights": "raw"})]
    lines = printed({"run": "x"}, numbers)
    rows = [line.split()[:2] for line in lines if line.strip().startswith("fd_digits_2k")]
    assert rows == [["fd_digits_2k", "0.2500"], ["fd_digits_2k", "0.7500"]]
    assert sum("raw weights" in line for line in lines) == 1


def test_the_time_of_a_measurement():
    seconds = {"reference": 1.0, "statistics": 5.0, "features": 5.0, "network": 90.0}
    assert time_line(seconds) == "network 90.0 s, features 5.0 s, statistics 5.0 s (5.0%), reference 1.0 s"
    assert time_line({}) == ""
