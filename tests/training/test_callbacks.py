"""Progress, sample grids and measurement in a tiny run."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from PIL import Image
from tiny import CLASSES, equal, fit, tiny_module, weights_of

from denoiselab.evaluation.metrics import Measured
from denoiselab.evaluation.records import Number
from denoiselab.training.ema import EMA
from denoiselab.training.measurement import Measurement
from denoiselab.training.monitor import TrainingMonitor
from denoiselab.training.pictures import SampleGrid
from denoiselab.training.progress import ProgressBar


def test_without_a_terminal_there_is_a_line_for_each_row_of_the_monitor(tmp_path, capsys, caplog):
    monitor = TrainingMonitor(every=2)
    with caplog.at_level(logging.INFO, logger="denoiselab"):
        fit(tiny_module(), tmp_path, steps=5, accumulate=2, callbacks=[monitor, ProgressBar()])
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.split()[1] for line in lines] == ["2/5", "4/5"]
    assert f"loss {monitor.latest['train/loss']:.4f}" in lines[-1]
    assert lines[-1].endswith("images/s")
    assert [r.message for r in caplog.records if r.name == "denoiselab"] == lines


def test_a_bar_on_a_terminal_is_taken_down_when_training_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    bar = ProgressBar()

    class Broken(TrainingMonitor):
        def on_train_batch_end(self, trainer, module, *rest):
            assert bar._bar is not None
            assert bar._bar.tasks[0].total == 4
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tiny_module(), tmp_path, callbacks=[bar, Broken(every=1)])
    assert bar._bar is None


def test_grids_of_all_weights_from_the_first_interval_on(tmp_path):
    module = tiny_module(ema=EMA(decays={"ema": 0.9, "slow": 0.99}))
    fit(module, tmp_path, steps=5, accumulate=2, callbacks=[SampleGrid(every=2, rows=3)])
    drawn = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert drawn == [f"step_000000{step}_{name}.png" for step in (2, 4, 5) for name in ("ema", "raw", "slow")]
    picture = Image.open(tmp_path / "samples" / drawn[0])
    assert picture.size == (CLASSES * 50 + 2, 3 * 50 + 2)  # a column for each class


def test_grids_draw_the_same_noise_every_time(tmp_path):
    frozen = tiny_module(optimizer=partial(torch.optim.SGD, lr=0.0))
    fit(frozen, tmp_path, callbacks=[SampleGrid(every=2, rows=2, seed=4)])
    pictures = {path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    assert len(pictures) == 1  # of steps 2 and 4, raw and averaged
    fit(frozen, tmp_path / "other", callbacks=[SampleGrid(every=4, rows=2, seed=5)])
    assert (tmp_path / "other/samples/step_0000004_raw.png").read_bytes() not in pictures


def test_drawing_does_not_change_training(tmp_path):
    plain, drawing = tiny_module(dropout=0.5), tiny_module(dropout=0.5)
    fit(plain, tmp_path)
    fit(drawing, tmp_path, callbacks=[SampleGrid(every=1, rows=1)])
    for a, b in zip(plain.parameters(), drawing.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("changes", [{"every": 0}, {"rows": 0}])
def test_bad_grids(changes):
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{key}={value}: must be at least 1"):
        SampleGrid(**({"every": 1, "rows": 1} | changes))


class CountingMetrics:
    """Keeps what it is asked to measure."""

    seed = 3

    def __init__(self, every, counts=(7,), every_counts=(4,), weights=None):
        self.extractors, self.every, self.weights, self.asked = {}, every, weights, []
        self.counts, self.every_counts = counts, every_counts

    def measure(self, source, labels, data, protocol, *, counts, advance, counting):
        assert counting is None  # Euler's evaluations are known
        images = torch.cat([images for _, images in source(range(max(counts)))])
        self.asked.append((images, labels, protocol))
        n, mean = max(counts), float(images.float().mean())
        numbers = [
            Number(f"mean_{n}", mean, 1.0, protocol, interval=(mean - 1, mean + 1)),
            Number("other", 2.0, None, protocol),
        ]
        advance(n)
        return Measured(numbers, {"network": 1.0}, [], images[:4])


@pytest.mark.parametrize(
    ("every", "measured"),
    [(None, [5]), (2, [2, 4, 5]), (5, [5])],
)
def test_when_a_run_is_measured(tmp_path, every, measured):
    metrics = CountingMetrics(every)
    callback = Measurement(metrics=metrics, batch_size=3)
    fit(tiny_module(), tmp_path, steps=5, accumulate=2, callbacks=[callback])
    assert [protocol["step"] for _, _, protocol in metrics.asked] == measured
    images, labels, protocol = metrics.asked[-1]
    assert images.shape == (7, 1, 4, 4)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (protocol["weights"], protocol["seed"], protocol["nfe"]) == ("ema", 3, 2)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(written) == 2 * len(measured)
    assert [Number.from_dict(w) for w in written[-2:]] == callback.numbers
    assert [len(images) for images, _, _ in metrics.asked] == [4] * (len(measured) - 1) + [7]
    assert (tmp_path / "samples" / "step_0000005_ema_closest.png").is_file()


def test_raw_weights_are_measured_if_asked_for(tmp_path):
    metrics = CountingMetrics(None, weights=["ema", "raw"])
    callback = Measurement(metrics=metrics)
    fit(tiny_module(), tmp_path, callbacks=[callback])
    (averaged, _, first), (raw, _, second) = metrics.asked
    assert (first["weights"], second["weights"]) == ("ema", "raw")
    assert first["weights_sha256"] != second["weights_sha256"]
    assert not torch.equal(averaged, raw)
    assert [n.protocol["weights"] for n in callback.numbers] == ["ema", "ema", "raw", "raw"]
    assert callback.seconds == {"network": 2.0}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_measuring_changes_neither_training_nor_its_data(tmp_path, dropout):
    plain, measured = tiny_module(dropout=dropout), tiny_module(dropout=dropout)
    fit(plain, tmp_path / "plain")
    fit(measured, tmp_path / "measured", callbacks=[Measurement(metrics=CountingMetrics(1, weights=["ema", "raw"]))])
    assert equal(weights_of(plain), weights_of(measured))
    assert equal(plain.ema.averages["ema"], measured.ema.averages["ema"])


def test_progress_is_told(tmp_path):
    told = []

    @contextmanager
    def progress(total, unit):
        told.append((total, unit))
        yield told.append

    fit(tiny_module(), tmp_path, callbacks=[Measurement(metrics=CountingMetrics(None), progress=progress)])
    assert told == [(7, "images"), 7]


def test_numbers_are_logged_beside_their_floors(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    rows = []

    class Rows(CSVLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((step, metrics))

    logger = Rows(tmp_path)
    fit(tiny_module(), tmp_path, callbacks=[Measurement(metrics=CountingMetrics(None))], loggers=[logger])
    ((step, row),) = rows
    assert step == 4
    ends = {"metrics/mean_7_low", "metrics/mean_7_high"}
    assert row.keys() == {"metrics/mean_7", "metrics/mean_7_real", "metrics/other"} | ends
    assert row["metrics/mean_7_real"] == 1.0


def test_nothing_is_drawn_where_nothing_is_measured(tmp_path):
    fit(tiny_module(), tmp_path, callbacks=[Measurement(metrics=CountingMetrics(1, counts=(), every_counts=()))])
    assert not (tmp_path / "metrics.jsonl").exists()
