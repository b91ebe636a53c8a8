from __future__ import annotations

import errno
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import TinyData, fit, tiny_module, tiny_objective

from denoiselab.data.dataset import InMemoryImages, LazyImages
from denoiselab.data.decoding import BrokenImageError
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow
from denoiselab.diffusion.prediction import V
from denoiselab.training import history
from denoiselab.training.history import TRACE, read_rows
from denoiselab.training.monitor import EDGES, NoiseLevelValidation, TrainingMonitor, bin_names, fingerprint


class Rows(CSVLogger):
    """Keeps what is logged."""

    def __init__(self, run_dir):
        super().__init__(run_dir, name="", version="")
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step} | metrics)


def monitored(every=1, folder=None):
    """A monitor between fake batches, without a training loop."""
    monitor, module = TrainingMonitor(every=every), tiny_module()
    logger = SimpleNamespace(rows=[], save_dir=None, log_metrics=lambda row, step: logger.rows.append(row))
    trainer = SimpleNamespace(
        global_step=0,
        accumulate_grad_batches=1,
        world_size=1,
        is_global_zero=True,
        loggers=[logger],
        default_root_dir=folder or tempfile.mkdtemp(),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.125}])],
    )
    monitor.on_train_start(trainer, module)

    def batch(log_snrs, losses):
        trainer.global_step += 1
        t = module.objective.path.t_of_log_snr(torch.tensor(log_snrs, dtype=torch.float64))
        outputs = {"t": t, "losses": torch.tensor(losses)}
        indices = torch.arange(len(losses))
        samples = {
            "index": indices + 100 * trainer.global_step,
            "place": indices,
            "stand_in": torch.zeros_like(indices),
        }
        monitor.on_train_batch_end(trainer, module, outputs, samples, trainer.global_step - 1)
        return logger.rows

    return batch


def test_each_sample_counts_in_its_own_bin():
    batch = monitored()
    log_snrs = [-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 6.5]
    row = batch(log_snrs, [float(i) for i in range(8)])[0]
    assert bin_names()[0] == "below_-6"
    assert bin_names()[-1] == "above_6"
    assert [row[f"train/loss_by_log_snr/{name}"] for name in bin_names()] == list(range(8))
    for level, name in zip(log_snrs, bin_names(), strict=True):
        if "_to_" in name:
            low, high = map(float, name.split("_to_"))
            assert low < level < high
    assert len(bin_names()) == len(EDGES) + 1


def test_means_are_over_all_samples_since_the_last_row():
    batch = monitored(every=2)
    assert batch([1.0, 1.5, -1.0], [1.0, 2.0, 9.0]) == []
    row = batch([0.5], [6.0])[0]
    assert row["train/loss_by_log_snr/0_to_2"] == pytest.approx(3.0)
    assert row["train/loss_by_log_snr/-2_to_0"] == 9.0
    assert row["train/loss"] == pytest.approx(18 / 4)
    assert row["train/lr"] == 0.125
    assert not any(name in key for key in row for name in ("below", "above"))  # nothing there, no number
    batch([-1.0], [5.0])
    row = batch([-1.0], [7.0])[1]
    assert row["train/loss_by_log_snr/-2_to_0"] == row["train/loss"] == 6.0
    assert "train/loss_by_log_snr/0_to_2" not in row


def test_pure_noise_is_in_the_last_bin():
    batch = monitored()
    assert batch([-math.inf], [2.0])[0]["train/loss_by_log_snr/below_-6"] == 2.0


def test_a_step_that_was_skipped_has_taught_nothing(tmp_path):
    batch = monitored(every=3, folder=tmp_path)
    batch([1.0, 1.0], [1.0, 2.0])
    batch([1.0, 1.0], [math.nan, 100.0])
    (row,) = batch([1.0, 1.0], [3.0, 6.0])
    assert row["train/loss"] == row["train/loss_by_log_snr/0_to_2"] == 3.0
    assert row["train/skipped_steps"] == 1
    assert [r["loss"] for r in read_rows(tmp_path / TRACE)] == ["1.5", "nan", "4.5"]


def test_every_row_with_numbers_has_its_seconds(tmp_path):
    rows = Rows(tmp_path)
    callbacks = [TrainingMonitor(every=4), NoiseLevelValidation(log_snrs=[0.0])]
    fit(tiny_module(), tmp_path, steps=6, val_every=3, callbacks=callbacks, loggers=[rows])
    assert [row["step"] for row in rows.rows] == [3, 4, 6]
    seconds = [row["train/seconds"] for row in rows.rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_is_in_the_trace(tmp_path, accumulate):
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.extend(outputs["losses"].tolist())

    fit(tiny_module(), tmp_path, steps=5, accumulate=accumulate, callbacks=[TrainingMonitor(every=2), Losses()])
    rows = read_rows(tmp_path / TRACE)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]  # those after the last row too
    for i, row in enumerate(rows):
        assert float(row["loss"]) == pytest.approx(sum(losses[8 * i : 8 * i + 8]) / 8)
        assert float(row["grad_norm"]) > 0
    assert len({row["samples"] for row in rows}) == 5


def test_a_full_disk_costs_no_row_of_the_trace(tmp_path, monkeypatch):
    append, full = history.append_text, [False, True, True, False]

    def append_text(path, text):
        if full.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, text)

    monkeypatch.setattr(history, "append_text", append_text)
    fit(tiny_module(), tmp_path, steps=7, callbacks=[TrainingMonitor(every=2)])
    assert [row["step"] for row in read_rows(tmp_path / TRACE)] == [str(step) for step in range(1, 8)]


class Fragile(LazyImages):
    """Twenty images of one class, two of which cannot be read."""

    def __init__(self, broken=(3, 5)):
        super().__init__(on_corrupt="skip")
        self.broken = broken

    def __len__(self):
        return 20

    def path(self, index):
        return Path(f"{index}.png")

    def read(self, index):
        if index in self.broken:
            raise BrokenImageError(f"{index}.png: is empty")
        return torch.full((1, 4, 4), index, dtype=torch.uint8)

    def peers(self, index):
        return range(20)

    def label(self, index):
        return 0


class FragileData(TinyData):
    def load(self, split):
        return Fragile() if split == "train" else super().load(split)


@pytest.mark.parametrize("workers", [0, 2])
def test_stand_ins_are_counted_and_each_broken_image_is_named_once(tmp_path, caplog, workers):
    class Drawn(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            counts.append(int(batch["stand_in"].sum()))

    counts, data, rows = [], FragileData(), Rows(tmp_path)
    data.num_workers = workers
    callbacks = [TrainingMonitor(every=4), Drawn()]
    fit(tiny_module(), tmp_path, steps=10, data=data, callbacks=callbacks, loggers=[rows])
    assert [row["data/skipped"] for row in rows.rows] == [sum(counts[:4]), sum(counts[4:8])]
    assert sum(counts) == 8  # 80 draws of 20 images: each of the two four times
    named = [record.getMessage() for record in caplog.records if "on_corrupt" in record.getMessage()]
    assert sorted(named) == [
        f"on_corrupt=skip: {i}.png: is empty; an image of the same class stands in" for i in (3, 5)
    ]


def test_without_stand_ins_none_are_told(tmp_path):
    rows = Rows(tmp_path)
    fit(tiny_module(), tmp_path, callbacks=[TrainingMonitor(every=2)], loggers=[rows])
    assert not any("data/skipped" in row for row in rows.rows)


def test_the_number_for_the_samples_tells_a_stand_in():
    index, place = torch.tensor([5, 9, 2, 7]), torch.arange(4)
    assert fingerprint(torch.tensor([5, ~9, 2, 7]), place) != fingerprint(index, place)


def test_a_resumed_run_writes_the_rows_and_the_trace_of_one_that_was_not_stopped(tmp_path):
    def trained(folder, steps, resume=None):
        rows = Rows(tmp_path / folder)
        module = tiny_module()
        trainer = fit(
            module, tmp_path / folder, steps=steps, callbacks=[TrainingMonitor(every=4)], loggers=[rows], resume=resume
        )
        trainer.save_checkpoint(tmp_path / folder / f"{steps}.ckpt")
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows.rows]

    whole = trained("whole", 8)
    first = trained("part", 6)
    rest = trained("part", 8, resume=tmp_path / "part/6.ckpt")
    assert [row["step"] for row in (*first, *rest)] == [4, 8]
    assert [*first, *rest] == whole  # the row of step 8 is of steps 5 and 6 too
    assert (tmp_path / "part" / TRACE).read_text() == (tmp_path / "whole" / TRACE).read_text()


def test_the_number_for_the_samples_of_a_step():
    index, place = torch.tensor([5, 9, 2, 7]), torch.arange(4)
    whole = fingerprint(index, place)
    assert 0 < int(whole) < 2**34
    order = torch.tensor([3, 0, 2, 1])
    assert fingerprint(index[order], place[order]) == whole  # whoever held which part
    assert fingerprint(index[:1], place[:1]) + fingerprint(index[1:], place[1:]) == whole
    assert fingerprint(index[order], place) != whole  # the same samples at other places
    others = {
        int(fingerprint(index + torch.eye(4, dtype=torch.int64)[i] * step, place))
        for i in range(4)
        for step in (1, 1000)
    }
    assert len(others) == 8
    assert int(whole) not in others


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_of_a_run(tmp_path, accumulate):
    rows, monitor = Rows(tmp_path), TrainingMonitor(every=2)
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.extend(outputs["losses"].tolist())

    fit(tiny_module(), tmp_path, steps=5, accumulate=accumulate, callbacks=[monitor, Losses()], loggers=[rows])
    assert [row["step"] for row in rows.rows] == [2, 4]
    for row, of in zip(rows.rows, (losses[:16], losses[16:32]), strict=True):
        assert row["train/loss"] == pytest.approx(sum(of) / 16)
        assert row["train/grad_norm"] > 0
        assert row["train/images_per_second"] > 0
    assert monitor.latest == {key: value for key, value in rows.rows[-1].items() if key != "step"}


def test_bad_values():
    with pytest.raises(ValueError, match="every=0: must be at least 1"):
        TrainingMonitor(every=0)
    with pytest.raises(ValueError, match=r"log_snrs=\[\]: needs at least one level"):
        NoiseLevelValidation(log_snrs=[])


@pytest.mark.parametrize(
    ("path", "reached"),
    [
        (
            RectifiedFlow(t_min=0.001, t_max=1.0),
            [-20.0, -8.0, 0.0, 8.0],
        ),  # to pure noise; ln(999²) = 13.8 at the data end
        (RectifiedFlow(t_min=0.1, t_max=0.9), [0.0]),  # ±4.4
        (DDPMLinear(t_min=0.001, t_max=1.0), [-8.0, 0.0, 8.0]),  # −10.1 to 9.2
        (Cosine(t_min=0.001, t_max=0.999), [-8.0, 0.0, 8.0]),
    ],
)
def test_levels_that_a_path_does_not_reach_are_skipped(path, reached):
    assert NoiseLevelValidation(log_snrs=[-20.0, -8.0, 0.0, 8.0, 20.0]).levels(path) == reached


class OneImage(TinyData):
    """A data set of one grey level, whose best denoiser is known."""

    def load(self, split):
        return InMemoryImages(torch.full((20, 1, 4, 4), 51, dtype=torch.uint8), torch.arange(20) % 3)


def validated(tmp_path, module, data, callback):
    from denoiselab.training.trainer import TrainerSettings

    rows = Rows(tmp_path)
    settings = TrainerSettings(accelerator="cpu", devices=1, max_steps=1, val_every=1)
    settings.build(tmp_path, [rows], [callback]).validate(module, datamodule=data, verbose=False)
    return rows.rows


class Perfect(torch.nn.Module):
    """Knows that every image is (51/127.5 − 1); speaks v on the cosine path."""

    def __init__(self, path):
        super().__init__()
        self.path, self.unused = path, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, condition):
        t = t[0].double() / 1000
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        x0 = torch.full_like(x, 51 / 127.5 - 1, dtype=torch.float64)
        return (alpha * (x - alpha * x0) / sigma - sigma * x0).to(x.dtype)


def test_a_perfect_denoiser_makes_no_error(tmp_path):
    path = Cosine(t_min=0.001, t_max=0.999)
    module = tiny_module(network=Perfect(path), objective=tiny_objective(path=path, prediction=V()))
    levels = [-6.0, -2.0, 0.0, 2.0, 6.0]
    (row,) = validated(tmp_path, module, OneImage(), NoiseLevelValidation(log_snrs=levels))
    assert {f"val/{space}_mse/log_snr_{level:g}" for space in ("x0", "epsilon") for level in levels} < row.keys()
    assert all(value < 1e-6 for key, value in row.items() if key.startswith("val/"))


class Silent(torch.nn.Module):
    """Outputs zeros."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, condition):
        return torch.zeros_like(x)


def test_the_error_is_that_of_the_closed_form(tmp_path):
    """With v = 0 on a variance preserving path x0 is guessed as α·x_t and ε as σ·x_t."""
    path = Cosine(t_min=0.001, t_max=0.999)
    module = tiny_module(network=Silent(), objective=tiny_objective(path=path, prediction=V()))
    (row,) = validated(tmp_path, module, OneImage(), NoiseLevelValidation(log_snrs=[1.0]))
    alpha, sigma = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))  # squared
    c = 51 / 127.5 - 1
    # x0 − α·x_t = σ²·c − α·σ·ε; ε − σ·x_t = α²·ε − α·σ·c, and ε has 20·16 values
    assert row["val/x0_mse"] == pytest.approx(sigma**2 * c**2 + alpha * sigma, rel=0.25)
    assert row["val/epsilon_mse"] == pytest.approx(alpha**2 + alpha * sigma * c**2, rel=0.25)
    assert row["val/x0_mse"] * alpha == pytest.approx(row["val/epsilon_mse"] * sigma, rel=1e-4)  # F-space: (σ/α)²


def test_the_noise_is_the_same_in_every_validation_and_batching(tmp_path):
    module = tiny_module()
    levels = [-4.0, 0.0, 4.0]
    first = validated(tmp_path, module, TinyData(), NoiseLevelValidation(log_snrs=levels))
    torch.manual_seed(5)
    again = validated(tmp_path, module, TinyData(), NoiseLevelValidation(log_snrs=levels))
    assert first == again
    small = TinyData()
    small.eval_batch_size = 3
    (row,) = validated(tmp_path, module, small, NoiseLevelValidation(log_snrs=levels))
    assert row == pytest.approx(first[0], rel=1e-4)


def test_validation_is_of_the_average_and_without_guidance(tmp_path):
    def refused(denoiser):
        raise AssertionError("guided")

    module = tiny_module(guidance=refused)
    with torch.no_grad():
        for value in module.ema.averages["ema"].values():
            value.zero_()
    (row,) = validated(tmp_path, module, TinyData(), NoiseLevelValidation(log_snrs=[0.0]))
    silent = tiny_module(network=Silent())
    (expected,) = validated(tmp_path, silent, TinyData(), NoiseLevelValidation(log_snrs=[0.0]))
    assert row == pytest.approx(expected)


def test_adding_a_level_does_not_change_the_others(tmp_path):
    module = tiny_module()
    (few,) = validated(tmp_path, module, TinyData(), NoiseLevelValidation(log_snrs=[0.0, 2.0]))
    (more,) = validated(tmp_path, module, TinyData(), NoiseLevelValidation(log_snrs=[-2.0, 0.0, 2.0]))
    assert more["val/x0_mse/log_snr_0"] == pytest.approx(few["val/x0_mse/log_snr_0"], rel=1e-6)
