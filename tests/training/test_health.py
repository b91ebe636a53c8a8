from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import TinyData, equal, fit, tiny_module, tiny_objective, weights_of

from denoiselab.data.order import GlobalBatchSampler
from denoiselab.diffusion.coupling import Independent
from denoiselab.diffusion.time_sampling import LossImportance
from denoiselab.runs.launch import launch
from denoiselab.training.gate import Gate
from denoiselab.training.health import Health, NonFiniteError, check_health, what
from denoiselab.training.health import incident as describe
from denoiselab.training.trainer import TrainerSettings

OPTIMIZERS = {
    "fused adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "fused sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
}


class Poison(Independent):
    """Noise that is NaN for one sample of some steps.

    Args:
        at: step (from 0) → place.
    """

    def __init__(self, at, value=torch.nan):
        self.at, self.value = at, value

    def __call__(self, x0, noise, condition):
        eps = super().__call__(x0, noise, condition)
        bad = noise.index == self.at.get(noise.step, -1)
        return torch.where(bad[:, None, None, None], self.value, eps)


class Snapshots(Callback):
    """All that a step may move, after each step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, *rest):
        self.after[trainer.global_step] = state_of(trainer, module)


def state_of(trainer, module):
    found = weights_of(module) | {f"ema.{k}": v.clone() for k, v in module.ema.averages["ema"].items()}
    for i, state in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"{i}.{k}": v.clone() for k, v in state.items() if torch.is_tensor(v)}
    return found


def poisoned(at, value=torch.nan, **changes):
    return tiny_module(objective=tiny_objective(coupling=Poison(at, value)), **changes)


def incident(run_dir, step):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((run_dir / f"incidents/step_{step:07d}.json").read_text(), parse_constant=refuse)


def indices(step):
    """What training draws at a step, by place."""
    order = GlobalBatchSampler(size=20, batch_size=8, seed=0, rank=0, world_size=1, accumulate=1, start_step=step)
    return [draw.index for draw in next(iter(order))]


def run(module, run_dir, *, health=None, steps=5, **settings):
    """The snapshots of a run, and the error that ended it."""
    snapshots, error = Snapshots(), None
    try:
        fit(module, run_dir, callbacks=[snapshots, health or Health()], steps=steps, **settings)
    except NonFiniteError as raised:
        error = str(raised)
    return snapshots.after, error


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_moves_nothing_and_stops_the_run(tmp_path, optimizer, value):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_0000002.ckpt").touch()
    module = poisoned({2: 5}, value, optimizer=OPTIMIZERS[optimizer])
    after, error = run(module, tmp_path, accumulate=2)
    assert list(after) == [0, 1, 2, 3]  # 0 after the first micro-batch
    assert not equal(after[2], after[1])
    assert equal(after[3], after[2])
    found = incident(tmp_path, 3)
    (sample,) = found["non_finite"]
    assert (sample["rank"], sample["micro_batch"], sample["place"]) == (0, 1, 5)
    assert error == (
        f"step 3: the loss is not finite (sample {sample['index']} at t={sample['t']:.4g}); see "
        "incidents/step_0000003.json; nothing was updated since: resume from checkpoints/step_0000002.ckpt "
        "with callbacks.health.policy=skip"
    )
    assert [part["place"] for part in found["batch"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [index for part in found["batch"] for index in part["index"]] == indices(step=2)
    assert sample["index"] == indices(step=2)[5]
    assert found["gradient_norm"] == "nan"
    assert (found["step"], found["policy"], found["bad_steps"]) == (3, "stop", 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipping_goes_on_as_if_the_step_had_not_been(tmp_path, optimizer):
    good, _ = run(tiny_module(optimizer=OPTIMIZERS[optimizer]), tmp_path)
    bad = poisoned({0: 0, 2: 5}, optimizer=OPTIMIZERS[optimizer])
    before = weights_of(bad)
    after, error = run(bad, tmp_path, health=Health(policy="skip"))
    assert error is None
    assert equal({key: after[1][key] for key in before}, before)  # the very first step leaves no trace either
    assert equal({key: after[1][f"ema.{key}"] for key in before}, before)
    assert equal(after[3], after[2])
    assert all(value.isfinite().all() for value in after[5].values())
    assert not equal(after[5], after[4])
    assert int(bad.gate.skipped) == 2
    assert bad.ema.updates == 5  # counts steps, skipped or not
    assert not equal(after[5], good[5])
    assert {path.name for path in (tmp_path / "incidents").iterdir()} >= {"step_0000001.json", "step_0000003.json"}


@pytest.fixture
def dirty_memory():
    """What torch.empty gives is NaN, not by chance zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_held_back_step_is_bit_equal_to_none(optimizer, dirty_memory):
    """The same gradients with and without a bad one in between."""

    def train(gradients):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(50))
        stepped, gate, ends = OPTIMIZERS[optimizer]([p]), Gate(), []
        gate.allowed = 5
        for gradient in gradients:
            p.grad = gradient.clone()
            gate.decide(torch.nn.utils.clip_grad_norm_([p], 1.0), stepped)
            stepped.step()
            ends.append(bool(gate.ok))
        return p.detach(), stepped.state_dict()["state"][0], ends

    gradients = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    bad = gradients[0].clone()
    bad[7] = -torch.inf
    expected, expected_state, _ = train(gradients)
    found, state, ends = train([bad, *gradients[:2], bad, bad, *gradients[2:]])
    assert ends == [False, True, True, False, False, True, True]
    assert torch.equal(found, expected)
    assert equal(state, expected_state)
    assert int(state.get("step", 4)) == 4


def test_an_average_of_a_held_back_step_stays_and_a_good_one_is_bit_equal():
    module, twin = tiny_module(), tiny_module()
    for network in (module.network, twin.network):
        with torch.no_grad():
            network.outer.weight += 0.1
    before = {key: value.clone() for key, value in module.ema.averages["ema"].items()}
    module.ema.update(module.network, torch.tensor(False))
    assert equal(module.ema.averages["ema"], before)
    twin.ema.updates = module.ema.updates
    module.ema.update(module.network, torch.tensor(True))
    twin.ema.update(twin.network)
    assert equal(module.ema.averages["ema"], twin.ema.averages["ema"])
    assert not equal(module.ema.averages["ema"], before)


def test_a_finite_loss_is_passed_on_exactly_and_others_poison_every_gradient():
    gate, x = Gate(), torch.tensor([1 / 3, 2.0], requires_grad=True)
    gate.mark(x[0]).backward()
    assert torch.equal(gate.mark(x[0]), x[0])
    assert x.grad.tolist() == [1.0, 0.0]
    for bad in (torch.nan, torch.inf):
        (gradient,) = torch.autograd.grad(gate.mark((x * torch.tensor([bad, 1.0])).sum()), x)
        assert gradient.isnan().all()
    gate.skipped += 1  # with policy stop nothing moves any more
    assert gate.mark(x[0]).isnan()
    gate.allowed = 1
    assert gate.mark(x[0]).isfinite()


def test_a_bad_gradient_is_found_though_all_losses_are_finite(tmp_path):
    module = tiny_module()
    module.network.outer.weight.register_hook(lambda g: g * (torch.inf if module.global_step == 1 else 1))
    after, error = run(module, tmp_path)
    assert error.startswith("step 2: the gradient is not finite (norm inf; all losses are); see incidents/step_0000002")
    assert equal(after[2], after[1])
    assert incident(tmp_path, 2)["non_finite"] == []


def test_more_bad_steps_than_allowed_stop_the_run(tmp_path):
    after, error = run(poisoned({1: 0, 2: 1, 3: 2}), tmp_path, health=Health(policy="skip", max_skipped=2), steps=9)
    assert max(after) == 4
    assert equal(after[4], after[1])
    assert error.startswith("step 4: the loss is not finite (sample ")
    assert error.endswith("nothing was updated since: start again with callbacks.health.max_skipped above 2")
    assert incident(tmp_path, 4)["bad_steps"] == 3


def test_a_resumed_run_goes_on_counting(tmp_path):
    trainer = fit(poisoned({1: 0}), tmp_path, callbacks=[Health(policy="skip", max_skipped=1)], steps=3)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    for allowed in (1, 2):
        module, health = poisoned({3: 0}), Health(policy="skip", max_skipped=allowed)
        _, error = run(module, tmp_path, health=health, steps=5, resume=tmp_path / "saved.ckpt")
        assert int(module.gate.skipped) == 2
        assert (error is None) == (allowed == 2)


def test_a_run_that_has_skipped_goes_on_with_another_policy(tmp_path):
    trainer = fit(poisoned({1: 0}), tmp_path, callbacks=[Health(policy="skip")], steps=3)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module = poisoned({3: 0})
    _, error = run(module, tmp_path, health=Health(policy="stop"), steps=3, resume=tmp_path / "saved.ckpt")
    assert error is None
    _, error = run(module, tmp_path, health=Health(policy="stop"), steps=5, resume=tmp_path / "saved.ckpt")
    assert error.startswith("step 4: the loss is not finite")
    assert error.endswith("callbacks.health.policy=skip")
    trainer = fit(poisoned({1: 0, 2: 0}), tmp_path, callbacks=[Health(policy="skip")], steps=4)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    health = Health(policy="skip", max_skipped=1)
    _, error = run(poisoned({}), tmp_path, health=health, steps=5, resume=tmp_path / "saved.ckpt")
    assert error == "max_skipped=1: the run has skipped 2 steps already"


class Late(Health):
    """Looks as late as on a GPU."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.lag = 2


class SavesAt(Callback):
    """Asks for the run's health before it would save."""

    def __init__(self, step):
        self.step, self.saved = step, []

    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step == self.step:
            check_health(trainer)
            self.saved.append(trainer.global_step)


def test_a_late_look_finds_nothing_moved_since(tmp_path):
    after, error = run(poisoned({1: 0}), tmp_path, health=Late(), steps=9)
    assert max(after) == 4  # two steps late
    assert error.startswith("step 2: ")
    for step in (2, 3, 4):
        assert equal(after[step], after[1])


def test_a_late_look_is_in_time_for_the_end(tmp_path):
    after, error = run(poisoned({4: 0}), tmp_path, health=Late(), steps=5)
    assert max(after) == 5
    assert error.startswith("step 5: ")


def test_a_late_look_is_in_time_for_a_save(tmp_path):
    health, saves = Late(), SavesAt(3)
    with pytest.raises(NonFiniteError, match=r"^step 2: "):
        fit(poisoned({1: 0}), tmp_path, callbacks=[health, saves], steps=9)
    assert saves.saved == []
    with pytest.raises(NonFiniteError, match=r"^step 2: "):  # and whoever asks after that
        health.drain(None)


def test_without_the_callback_nothing_moves_either_and_nothing_is_saved(tmp_path):
    module, saves = poisoned({1: 0}), SavesAt(3)
    with pytest.raises(NonFiniteError, match=r"^step 3: a loss or gradient up to here is not finite$"):
        fit(module, tmp_path, callbacks=[saves], steps=9)
    healthy = SavesAt(3)
    expected = tiny_module()
    fit(expected, tmp_path, callbacks=[healthy], steps=3)
    assert healthy.saved == [3]
    first = tiny_module()
    fit(first, tmp_path, steps=1)
    assert equal(weights_of(module), weights_of(first))


def test_losses_of_a_bad_step_are_not_learned_from(tmp_path):
    law = LossImportance(bins=2)
    module = tiny_module(objective=tiny_objective(time_sampling=law, coupling=Poison({2: 5})))
    fit(module, tmp_path, callbacks=[Health(policy="skip")], steps=4)
    assert int(law.count.sum()) == 3 * 8
    assert law.losses.isfinite().all()


def test_a_full_disk_does_not_hide_the_cause(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("denoiselab.training.health.write_text", full)
    _, error = run(poisoned({1: 0}), tmp_path)
    assert error.startswith("step 2: the loss is not finite")
    assert "could not be written ([Errno 28] No space left on device)" in caplog.text


def test_an_overflow_of_16_mixed_is_no_bad_step_unless_the_scale_is_down(tmp_path, monkeypatch):
    build, scaler = TrainerSettings.build, torch.amp.GradScaler(device="cpu", init_scale=4.0)

    def build_with_scaler(self, *arguments):
        trainer = build(self, *arguments)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer

    monkeypatch.setattr(TrainerSettings, "build", build_with_scaler)
    module = poisoned({1: 0, 2: 0, 3: 0}, optimizer=OPTIMIZERS["fused adamw"])
    after, error = run(module, tmp_path, steps=6)
    assert float(scaler.get_scale()) == 0.5  # 4, 2, then 1, where the step is bad
    for step in (2, 3, 4):
        assert equal(after[step], after[1])  # averages too
    assert error.startswith("step 4: ")
    assert int(module.gate.skipped) == 1


def test_the_samples_of_an_incident_are_in_order_of_place():
    rank_0 = [
        [[0.0, 1.0], [10.0, 11.0], [0.1, 0.2], [1.0, 2.0]],
        [[4.0, 5.0], [14.0, 15.0], [0.5, 0.6], [torch.inf, 1.0]],
    ]
    rank_1 = [[[2.0, 3.0], [12.0, 13.0], [0.3, 0.4], [torch.nan, -torch.inf]]]
    found = describe([rank_0, rank_1], torch.nan)
    keys = ("rank", "micro_batch", "place", "index", "t", "loss")
    expected = [(1, 0, 2, 12, 0.3, "nan"), (1, 0, 3, 13, 0.4, "-inf"), (0, 1, 4, 14, 0.5, "inf")]
    assert [tuple(sample[key] for key in keys) for sample in found["non_finite"]] == expected
    assert what(found) == "the loss is not finite (sample 12 at t=0.3 and 2 more)"
    assert [part["loss"] for part in found["batch"]] == [[1.0, 2.0], ["inf", 1.0], ["nan", "-inf"]]


@pytest.mark.parametrize(("key", "value"), [("policy", "ignore"), ("max_skipped", 0)])
def test_bad_settings(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value}: must be "):
        Health(**{key: value})


def train_two_ranks(folder):
    """One of two ranks, which runs four jobs of two micro-batches a step; what each left behind goes into a file."""
    results = {}
    for name, policy, at in (("good", "stop", {}), ("stop", "stop", {2: 5}), ("skip", "skip", {2: 6})):
        for optimizer in ("fused adamw", "adamw"):
            run_dir = Path(folder) / f"{name} {optimizer}"
            module, snapshots = poisoned(at, optimizer=OPTIMIZERS[optimizer]), Snapshots()
            settings = TrainerSettings(accelerator="cpu", devices=2, max_steps=4, val_every=1000, accumulate=2)
            trainer = settings.build(run_dir, [], [snapshots, Health(policy=policy)])
            if trainer.is_global_zero:
                run_dir.mkdir()
            error = None
            try:
                trainer.fit(module, datamodule=TinyData())
            except NonFiniteError as raised:
                error = str(raised)
            results[run_dir.name] = {"error": error, "after": snapshots.after}
    torch.save(results, Path(folder) / f"rank_{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_agree_on_a_bad_step_of_one(tmp_path):
    launch(train_two_ranks, (str(tmp_path),), 2)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        for name, found in rank.items():
            kind, _, optimizer = name.partition(" ")
            good, after = rank[f"good {optimizer}"]["after"], found["after"]
            assert equal(after[2], good[2])
            assert list(after) == ([0, 1, 2, 3] if kind == "stop" else [0, 1, 2, 3, 4])
            assert equal(after[3], after[2]) == (kind != "good")
            assert equal(after[3], ranks[0][name]["after"][3])
            assert (found["error"] is None) == (kind != "stop")
            assert found["error"] == ranks[0][name]["error"]
            if kind == "skip":
                assert not equal(after[4], after[3])
                assert equal(after[4], ranks[0][name]["after"][4])
    for kind, rank, place in (("stop", 0, 5), ("skip", 1, 6)):
        found = incident(tmp_path / f"{kind} fused adamw", 3)
        (sample,) = found["non_finite"]
        assert (sample["rank"], sample["micro_batch"], sample["place"], sample["loss"]) == (rank, 1, place, "nan")
        assert sorted(p for part in found["batch"] for p in part["place"]) == list(range(8))
        assert [(part["rank"], part["micro_batch"]) for part in found["batch"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
