from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import CLASSES, TinyData, equal, fit, tiny_module, tiny_objective, weights_of

from denoiselab.data.order import GlobalBatchSampler
from denoiselab.diffusion.coupling import Independent
from denoiselab.diffusion.time_sampling import LossImportance, Uniform
from denoiselab.diffusion.weighting import LearnedUncertainty, Unit
from denoiselab.runs.launch import launch
from denoiselab.training.schedule import Schedule
from denoiselab.training.trainer import TrainerSettings


class Seen(Callback):
    """The losses and times of every sample by (step, place), and the norm of every gradient."""

    def __init__(self):
        self.samples, self.norms = {}, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for place, index, loss, t in zip(
            batch["place"].tolist(),
            batch["index"].tolist(),
            outputs["losses"].tolist(),
            outputs["t"].tolist(),
            strict=True,
        ):
            self.samples[int(batch["step"][0]), place] = (index, t, loss)
        self.norms.append(float(module.grad_norm))


class RecordedNoise(Independent):
    """Remembers ε by (step, place)."""

    def __init__(self):
        self.drawn = {}

    def __call__(self, x0, noise, condition):
        eps = super().__call__(x0, noise, condition)
        self.drawn |= {(noise.step, int(place)): e for place, e in zip(noise.index, eps, strict=True)}
        return eps


def trained(run_dir, *, steps=4, accumulate=1, precision="32-true", gradient_clip=None, **changes):
    module, seen = tiny_module(**changes), Seen()
    fit(
        module,
        run_dir,
        steps=steps,
        accumulate=accumulate,
        precision=precision,
        gradient_clip=gradient_clip,
        callbacks=[seen],
    )
    return module, seen


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path):
    first, seen = trained(tmp_path, dropout=0.5)
    torch.manual_seed(123)  # whatever else draws from the global generator
    second, again = trained(tmp_path, dropout=0.5)
    assert len(seen.samples) == 4 * 8
    assert seen.samples == again.samples
    assert equal(weights_of(first), weights_of(second))


def test_another_seed_gives_other_times_and_noise(tmp_path):
    noise = [RecordedNoise(), RecordedNoise()]
    seen = [trained(tmp_path, steps=1, seed=i, objective=tiny_objective(coupling=noise[i]))[1] for i in range(2)]
    for place in range(8):
        assert seen[0].samples[0, place][1] != seen[1].samples[0, place][1]
        assert not torch.equal(noise[0].drawn[0, place], noise[1].drawn[0, place])


def test_accumulation_draws_the_same_and_gives_the_same_losses(tmp_path):
    noise = [RecordedNoise(), RecordedNoise()]
    whole, seen = trained(tmp_path, objective=tiny_objective(coupling=noise[0]))
    halves, seen_halves = trained(tmp_path, accumulate=2, objective=tiny_objective(coupling=noise[1]))
    assert seen.samples.keys() == seen_halves.samples.keys() == {(s, p) for s in range(4) for p in range(8)}
    for key, (index, t, loss) in seen.samples.items():
        assert seen_halves.samples[key][:2] == (index, t)
        assert seen_halves.samples[key][2] == pytest.approx(loss, rel=1e-4)
        assert torch.equal(noise[0].drawn[key], noise[1].drawn[key])
    for key, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(halves)[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [0, 5])
def test_the_gradient_of_one_rank_is_the_mean_over_two(step):
    data = TinyData().train_set()

    def gradient(rank, world_size):
        sampler = GlobalBatchSampler(
            size=len(data),
            batch_size=8,
            seed=0,
            rank=rank,
            world_size=world_size,
            accumulate=1,
            start_step=step,
        )
        batch = torch.utils.data.default_collate([data[draw] for draw in next(iter(sampler))])
        assert len(batch["place"]) == 8 // world_size
        module = tiny_module()
        module.trainer = SimpleNamespace(global_step=step, accumulate_grad_batches=1, global_rank=rank)
        module.training_step(batch, 0)["loss"].backward()
        return {key: p.grad for key, p in module.network.named_parameters()}

    whole, left, right = gradient(0, 1), gradient(0, 2), gradient(1, 2)
    for key, value in whole.items():
        torch.testing.assert_close((left[key] + right[key]) / 2, value, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(left[key], right[key])  # other samples with other noise


def test_times_are_stratified_over_the_global_batch(tmp_path):
    _, seen = trained(tmp_path, steps=2, accumulate=4, objective=tiny_objective(time_sampling=Uniform()))
    for (_, place), (_, t, _) in seen.samples.items():
        low, high = (0.001 + 0.999 * (place + edge) / 8 for edge in (0, 1))
        assert low <= t <= high


def test_the_gradient_norm_is_kept_and_the_gradient_clipped(tmp_path):
    sgd = partial(torch.optim.SGD, lr=1.0)
    before = weights_of(tiny_module())

    def step(limit):
        module, seen = trained(tmp_path, steps=1, gradient_clip=limit, optimizer=sgd)
        after = weights_of(module)
        moved = torch.cat([(after[key] - before[key]).flatten() for key in before]).norm()
        return float(moved), seen.norms[-1]

    free, norm = step(None)
    assert free == pytest.approx(norm, rel=1e-4)  # the closing norm is that of the whole gradient
    limit = norm / 10
    clipped, reported = step(limit)
    assert clipped == pytest.approx(limit, rel=1e-3)
    assert reported == pytest.approx(norm, rel=1e-5)  # from before clipping
    assert step(norm * 10)[0] == pytest.approx(free, rel=1e-4)


def test_bf16_mixed_trains_float32_weights(tmp_path):
    module, seen = trained(tmp_path, precision="bf16-mixed")
    _, exact = trained(tmp_path)
    assert {p.dtype for p in module.network.parameters()} == {torch.float32}
    for key, (index, t, loss) in seen.samples.items():
        assert exact.samples[key][:2] == (index, t)
        assert loss == pytest.approx(exact.samples[key][2], rel=0.1)
    assert seen.samples != exact.samples


def test_16_mixed_with_a_fused_optimizer_clips_the_true_gradient(tmp_path, monkeypatch):
    # Lightning offers 16-mixed on GPUs only, but the plugin itself and its scaler run anywhere.
    build = TrainerSettings.build

    def build_with_scaler(self, *arguments):
        trainer = build(self, *arguments)
        scaler = torch.amp.GradScaler(device="cpu")
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer

    fused = partial(torch.optim.AdamW, lr=0.01, fused=True)
    _, exact = trained(tmp_path, steps=1, gradient_clip=1.0, optimizer=fused)
    monkeypatch.setattr(TrainerSettings, "build", build_with_scaler)
    _, seen = trained(tmp_path, steps=1, gradient_clip=1.0, optimizer=fused)
    assert seen.norms[-1] == pytest.approx(exact.norms[-1], rel=0.05)


def test_the_schedule_is_stepped_once_per_optimizer_step(tmp_path):
    schedule = Schedule(decay="constant", steps=4, warmup_steps=4)
    module = tiny_module(schedule=schedule)
    trainer = fit(module, tmp_path, steps=3, accumulate=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)  # the rate of the fourth step
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_a_denoiser_is_in_evaluation_mode_and_puts_back_what_was():
    module = tiny_module(dropout=0.5)
    module.network.train()
    with module.denoiser() as denoiser:
        x, t = torch.randn(2, 1, 4, 4), torch.tensor(0.5, dtype=torch.float64)
        condition = SimpleNamespace(label=torch.tensor([0, CLASSES - 1]))
        first = denoiser(x, t, condition).x0
        assert torch.equal(first, denoiser(x, t, condition).x0)
        assert not first.requires_grad
    assert module.network.training
    with pytest.raises(RuntimeError, match="inside"), module.denoiser():
        raise RuntimeError("inside")
    assert module.network.training
    assert torch.is_grad_enabled()


def test_the_guidance_is_left_out_when_asked():
    module = tiny_module(guidance=lambda denoiser: ("guided", denoiser))
    with module.denoiser() as denoiser:
        assert denoiser[0] == "guided"
    with module.denoiser(guided=False) as denoiser:
        assert denoiser.network is module.network


class Elementwise(torch.nn.Module):
    """A network whose losses are rounded in the same way in every batch."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, condition):
        return self.factor * torch.sin(3 * x) * (1 + t / 500)[:, None, None, None]


def importance_module():
    """Its weights stand still: the sum of a gradient is rounded in another way in every batch."""
    weighting = LearnedUncertainty(over=Unit(), channels=4)
    objective = tiny_objective(time_sampling=LossImportance(bins=2), weighting=weighting)
    return tiny_module(network=Elementwise(), objective=objective, optimizer=partial(torch.optim.SGD, lr=0.0))


def history(module):
    return {key: value.clone() for key, value in module.objective.time_sampling.state_dict().items()}


def train_importance(folder: str) -> None:
    """One of two ranks."""
    module, run_dir = importance_module(), Path(folder)
    settings = TrainerSettings(accelerator="cpu", devices=2, max_steps=6, val_every=1000)
    settings.build(run_dir, [], []).fit(module, datamodule=TinyData())
    saved = (history(module), module.objective.weighting.linear.grad)
    torch.save(saved, run_dir / f"rank_{module.global_rank}.pt")


@pytest.mark.slow
def test_the_loss_history_does_not_depend_on_ranks_or_accumulation(tmp_path):
    told = []
    whole = importance_module()
    observe = whole.objective.observe
    whole.objective.observe = lambda t, loss: (told.append(len(t)), observe(t, loss))
    fit(whole, tmp_path, steps=6)
    assert told == [8] * 6  # once per step, of the whole batch
    law = whole.objective.time_sampling
    assert law.count.sum() == 6 * 8
    assert law.probabilities()[0] != 0.5  # it has taken effect
    halves = importance_module()
    fit(halves, tmp_path, steps=6, accumulate=2)
    assert equal(history(halves), history(whole))
    launch(train_importance, (str(tmp_path),), 2)
    for rank in (0, 1):
        found, gradient = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        assert equal(found, history(whole))
        torch.testing.assert_close(gradient, whole.objective.weighting.linear.grad)  # the mean over the ranks


def learning_module():
    weighting = LearnedUncertainty(over=Unit(), channels=4)
    return tiny_module(objective=tiny_objective(time_sampling=LossImportance(bins=2), weighting=weighting))


def test_what_an_objective_learns_is_trained_saved_and_resumed(tmp_path):
    whole, saved, resumed = learning_module(), learning_module(), learning_module()
    fit(whole, tmp_path, steps=6)
    trainer = fit(saved, tmp_path, steps=4)
    assert saved.objective.weighting.linear.ne(0).all()
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    fit(resumed, tmp_path, steps=6, resume=tmp_path / "saved.ckpt")
    assert not equal(saved.objective.state_dict(), whole.objective.state_dict())
    assert equal(resumed.objective.state_dict(), whole.objective.state_dict())
    assert equal(weights_of(resumed), weights_of(whole))


def test_other_objectives_are_told_nothing(tmp_path):
    module = tiny_module()
    module.objective.observe = module.all_gather = lambda *_: pytest.fail("nobody has asked")
    fit(module, tmp_path, steps=2)
    assert module.seen == []
