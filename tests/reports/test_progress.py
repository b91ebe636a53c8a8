from __future__ import annotations

import re

import pytest
from rich.console import Console

from denoiselab.reports import console
from denoiselab.reports.console import progress


class Clock:
    """A time that goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_line_each_tenth(clock, capsys):
    with progress(1000, "images") as advance:
        for _ in range(50):
            clock.now += 2
            advance(20)
    found = lines(capsys)
    assert found[0] == "images 100/1,000 (10%)  10.0 images/s  0:01:30 left"
    assert found[-1] == "images 1,000/1,000 (100%)  10.0 images/s  0:00:00 left"
    assert len(found) == 10


def test_a_quick_job_says_so_once(clock, capsys):
    with progress(80, "images") as advance:
        for _ in range(8):
            clock.now += 0.01
            advance(10)
    assert len(lines(capsys)) == 1


def test_a_slow_job_says_every_half_minute_at_first(clock, capsys):
    with progress(10**6, "images") as advance:
        for _ in range(600):
            clock.now += 1
            advance(1)
    assert len(lines(capsys)) == 20
    with progress(10**6, "images") as advance:
        for _ in range(24 * 360):
            clock.now += 10
            advance(1)
    assert 50 < len(lines(capsys)) < 150


def test_rank_0_speaks_for_all(clock, capsys, monkeypatch):
    monkeypatch.setattr(console, "ranks", lambda: (0, 4))
    with progress(1001, "images") as advance:
        clock.now += 10
        advance(251)
    assert lines(capsys) == ["images 1,001/1,001 (100%)  100.1 images/s  0:00:00 left"]
    with progress(300, "images", share=200) as advance:  # three shards for two ranks
        clock.now += 10
        advance(100)
        clock.now += 10
        advance(100)
    assert [line.partition(" (")[0] for line in lines(capsys)] == ["images 150/300", "images 300/300"]


def test_other_ranks_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(console, "ranks", lambda: (1, 2))
    with progress(10, "images") as advance:
        advance(10)
    assert lines(capsys) == []


def test_nothing_to_do(capsys):
    with progress(0, "images") as advance:
        advance(0)
    assert lines(capsys) == []


def test_a_bar_on_a_terminal(clock, capsys, monkeypatch):
    def terminal(stderr=False):
        return Console(stderr=stderr, force_terminal=True, width=100, color_system=None)

    monkeypatch.setattr(console, "Console", terminal)
    with progress(200, "images") as advance:
        clock.now += 10
        advance(50)
        advance(150)
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().out).replace("\r", "\n").strip().splitlines()[-1]
    assert re.match(r"images ━+ 200/200 20.0 images/s", last)
    assert last.endswith("left")
