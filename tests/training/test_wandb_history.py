from __future__ import annotations

import json

import pytest
from PIL import Image

from denoiselab.training.history import SECONDS, CSVLogger
from denoiselab.training.wandb_history import (
    STEP,
    History,
    Sent,
    affordable,
    pictures_of,
    read_sent,
    write_sent,
)


class Run:
    """A W&B run that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def log(self, row):
        self.rows.append(row)


def numbers_of(rows):
    return [(row[STEP], {key: value for key, value in row.items() if key != STEP}) for row in rows]


def picture(path=None):
    image = Image.new("L", (3, 2))
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        image.save(path, format="png")
    return image


def test_a_row_is_sent_whole_when_the_next_begins():
    run = Run()
    history = History(run)
    history.add(2, {"a": 1.0})
    history.add(2, {"b": 2.0})
    assert run.rows == []
    history.add(4, {"a": 3.0})
    assert numbers_of(run.rows) == [(2, {"a": 1.0, "b": 2.0})]
    history.flush()
    history.flush()
    assert numbers_of(run.rows) == [(2, {"a": 1.0, "b": 2.0}), (4, {"a": 3.0})]


def test_what_wandb_has_is_not_sent_again():
    run = Run()
    history = History(run, sent=Sent(4, frozenset({"a"})))
    for step in (2, 4, 6):
        history.add(step, {"a": 1.0, "b": 2.0})
    history.flush()
    assert numbers_of(run.rows) == [(4, {"b": 2.0}), (6, {"a": 1.0, "b": 2.0})]


def test_what_did_not_arrive_is_sent_again():
    noted = Sent(8, frozenset({"a"}), {2: 1, 8: 1})
    assert noted.at(8) == noted
    found = noted.at(6)  # W&B's word for its last row
    assert (found.step, found.pictures) == (6, {2: 1})
    assert found.has(6, "anything")  # a row that is not the newest was whole
    assert not found.has(8, "a")


def test_a_killed_run_goes_on_without_a_gap_or_a_double(tmp_path):
    first, second = Run(), Run()
    csv = CSVLogger(tmp_path)
    history = History(first, note=tmp_path)
    for step in (1, 2, 3, 4):
        csv.log_metrics({"a": float(step)}, step)
        history.add(step, {"a": float(step)})
    # Killed: the row of step 4 was never sent, and the checkpoint is of step 3.
    assert [row[STEP] for row in first.rows] == [1, 2, 3]
    resumed = History(second, sent=read_sent(tmp_path).at(2))  # and that of step 3 was lost on its way
    resumed.catch_up(tmp_path, 3)
    for step in (4, 5):
        resumed.add(step, {"a": float(step)})
    resumed.flush()
    assert numbers_of(second.rows) == [(3, {"a": 3.0}), (4, {"a": 4.0}), (5, {"a": 5.0})]


def test_a_number_that_a_stop_has_put_off_comes_later(tmp_path):
    first, second = Run(), Run()
    csv, history = CSVLogger(tmp_path), History(first, note=tmp_path)
    csv.log_metrics({"train/loss": 1.0}, 4)
    history.add(4, {"train/loss": 1.0})
    history.flush()  # stopped by a signal, before the validation of step 4
    resumed = History(second, sent=read_sent(tmp_path).at(4))
    resumed.catch_up(tmp_path)
    resumed.add(4, {"val/x0_mse": 2.0})
    resumed.flush()
    assert numbers_of(second.rows) == [(4, {"val/x0_mse": 2.0})]


def test_every_row_with_numbers_has_its_seconds():
    run = Run()
    history = History(run, sent=Sent(4, frozenset({"train/loss", SECONDS})))
    history.add(4, {"train/loss": 1.0, SECONDS: 3.0})
    history.add(4, {"val/x0_mse": 2.0, SECONDS: 3.0})  # that a stop has put off
    history.flush()
    assert numbers_of(run.rows) == [(4, {"val/x0_mse": 2.0, SECONDS: 3.0})]


def test_a_sparing_note_is_of_pictures(tmp_path):
    history = History(Run(), note=tmp_path, sparing=True)
    history.add(2, {"a": 1.0})
    history.flush()
    assert read_sent(tmp_path) == Sent()
    history.add_picture(3, "samples/ema", picture())
    history.flush()
    assert read_sent(tmp_path).pictures == {3: 1}


def test_pictures_are_caught_up_with_too(tmp_path):
    picture(tmp_path / "samples" / "step_0000004_ema.png")
    picture(tmp_path / "samples" / "step_0000004_ema_closest.png")
    (tmp_path / "samples" / "step_0000004_raw.png").write_text("damaged")
    (tmp_path / "samples" / "other.png").write_text("no picture of the run")
    assert list(pictures_of(tmp_path)[4]) == ["samples/ema", "samples/ema_closest_to_training", "samples/raw"]
    run = Run()
    history = History(run, end=4)
    history.catch_up(tmp_path)
    history.flush()
    (row,) = run.rows
    assert set(row) == {STEP, "samples/ema", "samples/ema_closest_to_training"}
    assert history.shown == 2


def sent_steps(budget, steps, end, count=1):
    """The steps whose pictures are sent, and how many they are."""
    sent = {}
    for step in steps:
        if number := affordable(step, count, sent, budget=budget, end=end):
            sent[step] = number
    return sent


def test_few_pictures_are_all_sent():
    assert sent_steps(64, range(400, 2001, 400), 2000, count=2) == dict.fromkeys(range(400, 2001, 400), 2)


def test_many_pictures_are_thinned_evenly_and_the_last_is_among_them():
    sent = sent_steps(4, range(100, 1001, 100), 1000)
    assert list(sent) == [300, 600, 800, 1000]
    sent = sent_steps(64, range(1, 10_001), 10_000)
    assert sum(sent.values()) == 64
    gaps = [b - a for a, b in zip(sent, list(sent)[1:], strict=False)]
    assert max(gaps) <= min(gaps) + 1
    assert max(sent) == 10_000


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_budget_is_never_exceeded(budget, count):
    for end in (None, 50, 500):
        sent = sent_steps(budget, range(1, 1000, 7), end, count=count)
        assert sum(sent.values()) <= budget
    if budget >= 1:
        assert affordable(500, count, {}, budget=budget, end=500) == min(count, budget)


def test_a_longer_run_keeps_to_its_budget():
    sent = sent_steps(8, range(10, 101, 10), 100)
    assert sum(sent.values()) == 8
    assert affordable(150, 1, sent, budget=8, end=200) == 0


def test_the_note_survives_and_damage_is_no_note(tmp_path):
    assert read_sent(tmp_path) == Sent()
    sent = Sent(7, frozenset({"a", "b"}), {4: 2})
    write_sent(tmp_path, sent)
    assert read_sent(tmp_path) == sent
    for content in ("{", "[]", '{"step": "x"}', json.dumps({"step": 1, "keys": 3, "pictures": {}})):
        (tmp_path / "wandb" / "sent.json").write_text(content)
        assert read_sent(tmp_path) == Sent()
