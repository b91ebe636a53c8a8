"""Fronts, halving and directions by hand; the table, the page and the figure of stand-in points."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from denoiselab.reports.frontier import (
    COSTS,
    Frontier,
    Point,
    Skipped,
    higher_is_better,
    pareto,
    rungs,
    survivors,
)
from denoiselab.reports.frontier_pages import print_frontier, records, write_frontier


def point(nfe, value, seconds=None, sampler="ddim", scale=1.0, **others):
    return Point(sampler, scale, str(nfe), nfe, 0.001 * nfe if seconds is None else seconds, value, **others)


def front(points, cost="NFE", higher=False):
    return [(p.nfe, p.value) for p in pareto(points, COSTS[cost], higher=higher)]


def test_a_point_is_on_the_front_if_nothing_as_cheap_is_better():
    points = [point(8, 2.0), point(1, 9.0), point(4, 3.0), point(2, 9.5), point(4, 2.5), point(16, 2.0), point(32, 1.0)]
    # 2 is dearer and worse than 1; of the two at 4 the better one; 16 is dearer than 8 and no better
    assert front(points) == [(1, 9.0), (4, 2.5), (8, 2.0), (32, 1.0)]
    assert front(points, higher=True) == [(1, 9.0), (2, 9.5)]


def test_each_cost_has_its_own_front():
    slow, fast, dear = point(2, 1.0, seconds=0.5), point(4, 2.0, seconds=0.1), point(8, 3.0, seconds=0.2)
    assert front([slow, fast, dear]) == [(2, 1.0)]
    assert front([slow, fast, dear], cost="s") == [(4, 2.0), (2, 1.0)]


def test_one_of_two_equal_points_is_on_the_front_and_no_nan():
    assert front([point(1, math.nan), point(1, 2.0), point(1, 2.0), point(2, 2.0)]) == [(1, 2.0)]
    assert front([point(1, math.nan)]) == []


def test_uncertainty_is_half_an_interval_or_of_the_jackknife_or_a_tenth():
    assert point(1, 5.0, interval=(4.0, 7.0)).uncertainty == 1.5
    # blocks 1, 2, 3 left out: variance 2/3·(1 + 0 + 1)
    assert point(1, 5.0, jackknife=[1.0, 2.0, 3.0]).uncertainty == pytest.approx(1.96 * math.sqrt(4 / 3))
    assert point(1, -5.0).uncertainty == 0.5


def test_halving_drops_what_is_beaten_beyond_both_uncertainties():
    best = point(4, 1.0, interval=(0.7, 1.3))
    near = point(4, 1.49, interval=(1.09, 1.89))  # 0.49 worse; together they are uncertain by √(0.09 + 0.16) = 0.5
    beaten = point(8, 1.51, interval=(1.11, 1.91))
    cheap = point(1, 50.0, interval=(49.0, 51.0))  # on the front: nothing as cheap is better
    assert survivors([beaten, cheap, near, best], higher=False) == [cheap, near, best]


def test_halving_keeps_what_is_on_the_front_of_seconds_alone():
    wasteful = point(8, 2.0, seconds=0.001, interval=(1.9, 2.1))
    rival = point(4, 1.0, seconds=0.004, interval=(0.9, 1.1))
    assert survivors([wasteful, rival], higher=False) == [wasteful, rival]
    slower = point(8, 2.0, seconds=0.005, interval=(1.9, 2.1))
    assert survivors([slower, rival], higher=False) == [rival]
    assert survivors([slower, rival], higher=True) == [slower, rival]


def test_rungs_are_an_eighth_a_quarter_a_half_and_all():
    assert rungs(800, 4) == [100, 200, 400, 800]
    assert rungs(500, 100) == [125, 250, 500]
    assert rungs(4, 4) == [4]


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("fid_50k", False),
        ("fd_inf_digits_500", False),
        ("kd_digits", False),
        ("copy_rate_digits_500", False),
        ("is", True),
        ("recall_digits_2k", True),
        ("class_diversity", True),
    ],
)
def test_directions(metric, higher):
    assert higher_is_better(metric) is higher


@pytest.mark.parametrize("metric", ["nearest_500", "isotropy", "f", ""])
def test_a_number_without_a_better_end_is_refused(metric):
    with pytest.raises(ValueError, match=f"metric={metric}: must be one that has a better end: fid, "):
        higher_is_better(metric)


@pytest.fixture
def frontier():
    points = [
        point(1, 9.0, interval=(8.0, 10.0), floor=0.5, count=500),
        point(8, 1.0, interval=(0.9, 1.1), floor=0.5, count=500),
        point(3, 1.5, sampler="heun", scale=1.5, interval=(1.4, 1.6), floor=0.5, count=500),
        point(7.25, 4.0, sampler="dopri5", count=500),
        point(2, 20.0, sampler="heun", count=62, pruned=True),
    ]
    skipped = [Skipped("heun", 1.5, "1", "nfe=1: one step of this sampler already costs more")]
    return Frontier("fd_inf_digits_500", points, skipped, {"run": "a-run", "device": "a machine"})


def test_the_table_marks_fronts_and_says_what_was_left_out(frontier):
    out = io.StringIO()
    print_frontier(Console(file=out, width=160), frontier)
    lines = {tuple(line.split()[:5]): line for line in out.getvalue().splitlines() if line.strip()}
    assert ("NFE,", "s", "ddim", "1", "1") in lines
    assert ("NFE,", "s", "heun", "1.5", "3") in lines
    assert ("dopri5", "1", "7.2", "7.25", "4") in lines
    assert any("pruned at n=62 (20)" in line for line in lines.values())
    assert "skipped, nfe=1: one step of this sampler already costs more: heun at scale 1.5 (1)\n" in out.getvalue()


def test_files(frontier, tmp_path):
    write_frontier(frontier, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "frontier.png", "table.csv"]
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["front_nfe"] for row in rows] == ["True", "True", "True", "False", "False", ""]
    assert (rows[0]["value"], rows[0]["low"], rows[0]["high"], rows[0]["real"]) == ("9.0", "8.0", "10.0", "0.5")
    assert rows[4]["note"] == "pruned"
    assert rows[5]["note"].startswith("skipped: nfe=1")
    page = (tmp_path / "README.md").read_text()
    assert "| NFE, s | heun | 1.5 | 3 | 3 | 1.5 | 1.4 – 1.6 |  |" in page
    assert "- run: a-run" in page
    assert "smaller is better" in page


def test_records_have_the_same_keys_and_plain_values(frontier):
    rows = records(frontier)
    assert len(rows) == 6
    assert len({tuple(row) for row in rows}) == 1
    assert {type(value) for row in rows for value in row.values()} <= {str, float, int, bool, type(None)}


@pytest.mark.parametrize("lowest", [1.0, -0.3])
def test_the_figure_shows_every_sampler_also_below_zero(frontier, tmp_path, lowest):
    """A colour of its own for each sampler; an extrapolated distance can be negative, which a logarithm cannot show."""
    points = [point(2**i, lowest + 9 / 2**i, sampler=name) for i in range(4) for name in ("a", "b", "c")]
    write_frontier(Frontier("fd_inf_digits_500", [*points, point(16, lowest, sampler="a")], [], {}), tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "frontier.png").convert("RGB")).reshape(-1, 3)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (pixels == color).all(1).sum() > 100
