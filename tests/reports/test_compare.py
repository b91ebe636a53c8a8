"""Means, intervals and differences against values computed by hand, and what stands in the table."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from dataclasses import replace
from statistics import fmean

import pytest
from rich.console import Console

from denoiselab.evaluation.intervals import jackknife_interval
from denoiselab.reports.compare import (
    BARE,
    BLOCKS,
    SEEDS,
    UNPAIRED,
    difference,
    side_by_side,
    summarise,
    t_interval,
)
from denoiselab.reports.compare_pages import as_csv, as_json, as_markdown, print_comparison
from denoiselab.reports.measured_runs import read_all
from stand_in_runs import number, write_run


def fd(value, **given):
    return number("fd_inf_digits_2k", value, **given)


def found(*paths, vary=(), columns=None):
    return side_by_side(read_all(paths)[0], vary=vary, columns=columns)


# --- statistics ---


def test_t_interval_of_three_values():
    """t(2) = 4.302653; the standard deviation of 1, 2, 6 is the root of 7."""
    half = 4.302653 * math.sqrt(7 / 3)
    assert t_interval([1.0, 2.0, 6.0]) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_one_run_keeps_its_own_interval_and_several_have_one_over_seeds():
    assert summarise([fd(1.0, interval=(0.5, 1.2))]).interval == (0.5, 1.2)
    cell = summarise([fd(1.0, interval=(0.99, 1.01)), fd(3.0, interval=(2.99, 3.01))])
    half = 12.706205 * math.sqrt(2) / math.sqrt(2)
    assert (cell.value, cell.n) == (2.0, 2)
    assert cell.interval == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_shared_training_seeds_are_paired_and_the_others_left_out():
    """The seeds scatter by 10, the difference by 0.1; seed 9 has no partner."""
    less = difference({0: fd(1.0), 1: fd(11.0), 2: fd(21.0)}, {2: fd(20.1), 1: fd(10.0), 0: fd(-0.1), 9: fd(500.0)})
    assert less.how == SEEDS
    assert less.value == pytest.approx(-1)
    assert less.interval == pytest.approx(t_interval([-1.1, -1.0, -0.9]))
    assert less.clear


def test_single_runs_on_one_noise_are_paired_block_by_block():
    first, other = fd(1.0, jackknife=[1.0, 1.2, 0.8, 1.0]), fd(1.5, jackknife=[1.5, 1.8, 1.2, 1.5])
    less = difference({0: first}, {1: other})
    # d = 0.5, 0.6, 0.4, 0.5: variance 3/4 · 0.02, t(3) = 3.182446
    half = 3.182446 * math.sqrt(0.75 * 0.02)
    assert (less.how, less.value) == (BLOCKS, 0.5)
    assert less.interval == pytest.approx((0.5 - half, 0.5 + half), rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": {"seed": 1}},
        {"protocol": {"count": 1000}},
        {"protocol": {"class_balance": "as given"}},
        {"jackknife": [1.0, 1.1, 1.0]},
        {"jackknife": None},
    ],
)
def test_unlike_draws_are_not_paired(change):
    given = {"interval": (0.9, 1.3), "jackknife": [1.0, 1.1]}
    less = difference({0: fd(1.0, **given)}, {0: fd(2.0, **given | change)})
    assert less.how == UNPAIRED
    # the lower arm: 1.1 of the other and 0.3 of the first
    assert less.interval == pytest.approx((1 - math.hypot(1.1, 0.3), 1 + math.hypot(-0.7, 0.1)))


def test_an_interval_over_seeds_and_one_over_samples_are_not_added():
    several = {0: fd(1.0), 1: fd(1.1)}
    less = difference(several, {7: fd(2.0, interval=(1.9, 2.1))})
    assert (less.how, less.interval) == (BARE, None)
    assert not less.clear
    assert difference({0: fd(1.0)}, {0: fd(2.0, interval=(1.9, 2.1))}).how == BARE
    assert difference(several, {2: fd(2.0), 3: fd(2.1)}).how == UNPAIRED


def test_paired_blocks_are_much_narrower_and_still_cover():
    """Two means of one noise, whose difference scatters twenty times less than either: the interval knows, and covers."""
    draw, blocks, covered = random.Random(0), 20, 0
    for _ in range(200):
        noise = [draw.gauss(0, 1) for _ in range(200)]
        drawn = {}
        for i, sample in enumerate((noise, [x + 0.3 + draw.gauss(0, 0.05) for x in noise])):
            without = [fmean(x for n, x in enumerate(sample) if n % blocks != b) for b in range(blocks)]
            interval = jackknife_interval(fmean(sample), without)
            drawn[i] = fd(fmean(sample), interval=interval, jackknife=without)
        paired = difference({0: drawn[0]}, {0: drawn[1]})
        unpaired = difference({0: drawn[0]}, {0: replace(drawn[1], jackknife=None)})
        widths = [less.interval[1] - less.interval[0] for less in (paired, unpaired)]
        assert (paired.how, unpaired.how) == (BLOCKS, UNPAIRED)
        assert widths[0] < 0.1 * widths[1]
        covered += paired.interval[0] < 0.3 < paired.interval[1]
    assert 180 <= covered <= 198


# --- the table ---


@pytest.fixture
def sweep(tmp_path):
    """Three seeds of ε, two of v and one of x0."""
    values = {"epsilon": [0.40, 0.44, 0.36], "v": [0.31, 0.34], "x0": [0.9]}
    return [
        write_run(
            tmp_path / f"{objective}_{seed}",
            fd(value, interval=(value - 0.1, value + 0.1)),
            number("accuracy_2k", 0.9, floor=0.99, protocol={"measure": {"name": "Adherence"}}),
            objective=objective,
            seed=seed,
        )
        for objective, some in values.items()
        for seed, value in enumerate(some)
    ]


def test_runs_that_differ_in_their_seed_share_a_row(sweep):
    table = found(*sweep)
    assert [(row.name, len(row.runs)) for row in table.rows] == [
        ("objective=epsilon", 3),
        ("objective=v", 2),
        ("objective=x0", 1),
    ]
    epsilon, v, x0 = (row.cells["fd_inf_digits_2k"] for row in table.rows)
    assert (epsilon.value, v.value, x0.value) == pytest.approx((0.40, 0.325, 0.9))
    assert x0.interval == pytest.approx((0.8, 1.0))
    less = table.rows[1].differences["fd_inf_digits_2k"]
    assert (less.value, less.how) == (pytest.approx(-0.095), SEEDS)
    assert table.rows[2].differences["fd_inf_digits_2k"].how == BARE
    assert table.floors == {"accuracy_2k": 0.99}
    assert table.rows[0].differences == {}


def test_a_seed_that_is_there_twice_is_no_second_seed(tmp_path):
    runs = [write_run(tmp_path / name, fd(0.4), seed=0) for name in ("a", "b")]
    table = found(*runs)
    assert [row.cells["fd_inf_digits_2k"].n for row in table.rows] == [1, 1]
    assert len({row.name for row in table.rows}) == 2
    assert table.notes == ["one config and seed more than once, a row each: a, b"]


def test_what_is_missing_or_differs_is_said(tmp_path):
    one = write_run(tmp_path / "a", fd(0.4, floor=0.1), number("kd_2k", 1.0), seed=0)
    two = write_run(tmp_path / "b", fd(0.4, floor=0.2, protocol={"seed": 5}), seed=1)
    table = found(one, two)
    assert table.notes == [
        "b has no kd_2k",
        "fd_inf_digits_2k: the runs do not agree on the value of real test images",
        "sampling seeds differ, and such samples are not paired: 0 in a, 5 in b",
    ]
    assert table.rows[0].cells["kd_2k"].n == 1
    assert table.floors == {}


def test_of_several_weights_the_average_is_taken_unless_asked(tmp_path):
    raw = {"protocol": {"weights": "raw"}}
    run = write_run(tmp_path / "a", fd(0.9, **raw), fd(0.4))
    table = found(run)
    assert [row.cells["fd_inf_digits_2k"].value for row in table.rows] == [0.4]
    assert table.notes == ["a: numbers of the raw weights are left out; vary=[weights] shows them"]
    table = found(run, vary=["weights"])
    assert [row.name for row in table.rows] == ["weights=raw", "weights=ema"]


def printed(table, width):
    console = Console(file=io.StringIO(), width=width)
    print_comparison(console, table)
    return console.file.getvalue()


def test_a_name_is_no_markup(tmp_path):
    runs = [write_run(tmp_path / name, number("[/bold]fd[red]", value)) for name, value in (("a", 1.0), ("b", 2.0))]
    assert "[/bold]fd[red]" in printed(found(*runs), 120)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_everything_at_any_width(sweep, width):
    text = printed(found(*sweep), width)
    for shown in (
        "0.3250",
        "[0.1344, 0.5156]",
        "−0.0950",
        "real test images",
        "0.9900",
        "fd_inf_digits_2k",
        "accuracy_2k",
    ):
        assert shown in text
    assert "…" not in text
    # folders stand in one piece below the table, and are not bound to the width
    above, _, below = text.partition("Protocol: 2,000 samples (balanced), ")
    assert max(map(len, above.splitlines())) <= width
    assert [f"{path} (seed {path.name[-1]})" in below for path in sweep] == [True] * len(sweep)


def test_the_captions_say_what_intervals_and_differences_are(tmp_path, sweep):
    text = " ".join(printed(found(*sweep), 120).split())
    assert "of n > 1 runs Student's t over their training seeds" in text
    assert "paired by training seed" in text
    assert text.count("Protocol: ") == 1
    jackknife = [0.40, 0.41, 0.39, 0.40]
    share = {"interval": (0.89, 0.92), "protocol": {"measure": {}}}
    runs = [
        write_run(
            tmp_path / objective,
            fd(0.4 + shift, jackknife=[x + shift for x in jackknife], interval=(0.3, 0.6)),
            number("accuracy_2k", 0.9, **share),
            objective=objective,
        )
        for objective, shift in (("one", 0.0), ("two", 0.1))
    ]
    text = " ".join(printed(found(*runs), 120).split())
    assert "+0.1000 *ᵃ" in text
    assert "+0.0000ᵇ" in text
    assert "ᵃ paired by block of samples" in text
    assert "ᵇ unpaired" in text


def test_files(sweep):
    table = found(*sweep)
    page = as_markdown(table)
    assert "| objective=v | 2 | 0.3250 [0.1344, 0.5156] | 0.9000 [0.9000, 0.9000] |" in page
    assert "| real test images |  |  | 0.9900 |" in page
    assert "| less objective=epsilon |" in page
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [(row["row"], row["metric"], row["n"]) for row in rows][2] == ("objective=v", "fd_inf_digits_2k", "2")
    assert float(rows[2]["difference"]) == pytest.approx(-0.095)
    assert rows[2]["difference_is"] == SEEDS
    whole = json.loads(as_json(table))
    assert {row["protocol_id"] for row in whole["numbers"]} == set(whole["protocols"])
    assert len(whole["protocols"]) == 2
