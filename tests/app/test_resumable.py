"""What a checkpoint holds beside weights, as an enemy would write it: it is refused in one line before anything is made."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from calls import call

from denoiselab.app.build import make_module, make_training
from denoiselab.app.nodes import make_network
from denoiselab.app.resumable import check_run
from denoiselab.runs.errors import ConfigError
from denoiselab.training.checkpoint import newest_checkpoint
from denoiselab.training.checkpoint_io import load_run

LONGER = ["trainer.max_steps=6", "allow=[schedule.steps]"]
HUGE = torch.zeros(1).expand(10**6, 10**6)


@pytest.fixture(scope="module")
def saved(tiny_run):
    """A run's checkpoint, and the objects that would go on from it."""
    loaded = load_run(newest_checkpoint(tiny_run))
    parts, training = make_training(loaded["config"])
    return loaded, loaded["config"], parts, training


def checked(saved, change=lambda checkpoint: None):
    loaded, config, parts, training = saved
    module = make_module(config, parts, training, make_network(config, device="meta"), {})
    loaded = copy.deepcopy(loaded)
    change(loaded)
    check_run(loaded, module, training.callbacks.values(), "resume=x")


def test_a_good_one_is_taken(saved):
    checked(saved)
    checked(saved, lambda c: c.pop("callbacks"))
    checked(saved, lambda c: c["optimizer_states"][0]["state"].clear())  # no step was good yet
    checked(saved, lambda c: c["lr_schedulers"][0].pop("_last_lr"))


def state(checkpoint, index=0):
    return checkpoint["optimizer_states"][0]["state"][index]


def groups(checkpoint):
    return checkpoint["optimizer_states"][0]["param_groups"]


def average(checkpoint):
    return checkpoint["ema"]["ema"]


def first(tensors):
    return next(iter(tensors))


def averaged(value):
    def change(checkpoint):
        found = average(checkpoint)
        found[first(found)] = value(found[first(found)])

    return change


def group(**changes):
    return lambda checkpoint: groups(checkpoint)[0].update(changes)


def schedule(**changes):
    return lambda checkpoint: checkpoint["lr_schedulers"][0].update(changes)


def spread(value):
    """The same shape, with the same place in memory for all numbers, in a storage that would hold them all."""
    return torch.zeros(value.numel())[-1:].expand(value.shape)


SCHEDULE = "is no schedule's state"
OPTIMIZER = "is no optimizer's state"
GROUP = "has other parameters, or settings that are no plain data"
BAD = {
    "no optimizer": (lambda c: c.update(optimizer_states=[]), "one optimizer and one schedule"),
    "two optimizers": (lambda c: c["optimizer_states"].append({}), "one optimizer and one schedule"),
    "a number as optimizer": (lambda c: c.update(optimizer_states=[3]), OPTIMIZER),
    "an empty optimizer": (lambda c: c.update(optimizer_states=[{}]), OPTIMIZER),
    "a number as group": (lambda c: c["optimizer_states"][0].update(param_groups=[3]), GROUP),
    "no group": (lambda c: c["optimizer_states"][0].update(param_groups=[]), "has 0 groups"),
    "two groups": (lambda c: c["optimizer_states"][0].update(param_groups=2 * groups(c)), "has 2 groups"),
    "other parameters": (group(params=[0]), GROUP),
    "a dict as rate": (group(lr={"a": 1}), GROUP),
    "a tensor as rate": (group(lr=torch.zeros(3)), GROUP),
    "a rate of many digits": (group(lr=10**600), GROUP),
    "moments of another shape": (lambda c: state(c).update(exp_avg=torch.zeros(3, 5)), "exp_avg of parameter 0 is not"),
    "giant moments": (lambda c: state(c).update(exp_avg_sq=HUGE), "exp_avg_sq of parameter 0 is not"),
    "moments of one number": (lambda c: state(c).update(exp_avg=torch.zeros(())), "exp_avg of parameter 0 is not"),
    "moments in one place": (lambda c: state(c).update(exp_avg=spread(state(c)["exp_avg"])), "exp_avg of parameter 0 is not"),
    "half moments": (lambda c: state(c).update(exp_avg=state(c)["exp_avg"].half()), "exp_avg of parameter 0 is not"),
    "a list as moments": (lambda c: state(c).update(exp_avg=[1.0]), "exp_avg of parameter 0 is not"),
    "moments that are no numbers": (lambda c: state(c)["exp_avg"].fill_(torch.nan), "holds what is not a number"),
    "a step of a shape": (lambda c: state(c).update(step=torch.zeros(4)), "step of parameter 0 is not"),
    "a step that is a number": (lambda c: state(c).update(step=3), "step of parameter 0 is not"),
    "a missing moment": (lambda c: state(c).pop("exp_avg"), "has step, exp_avg_sq of a parameter, and this one step,"),
    "an unknown moment": (lambda c: state(c).update(x=torch.zeros(3)), "has step, exp_avg, exp_avg_sq, x of a parameter"),
    "an unknown parameter": (lambda c: c["optimizer_states"][0]["state"].update({10**6: {}}), "knows a parameter 1000000"),
    "a parameter by name": (lambda c: c["optimizer_states"][0]["state"].update({"a": {}}), "knows a parameter a"),
    "no schedule": (lambda c: c.update(lr_schedulers=[]), "one optimizer and one schedule"),
    "text as schedule": (lambda c: c.update(lr_schedulers=["x"]), SCHEDULE),
    "a schedule's method": (schedule(step=3), SCHEDULE),
    "a schedule's optimizer": (schedule(optimizer=None), SCHEDULE),
    "a schedule's function": (schedule(lr_lambdas=[{"steps": 3}]), SCHEDULE),
    "a schedule's step as text": (schedule(last_epoch="x"), SCHEDULE),
    "a schedule's step below 0": (schedule(last_epoch=-1), SCHEDULE),
    "a schedule's rates": (schedule(base_lrs=[1.0, 2.0]), SCHEDULE),
    "no Lightning": (lambda c: c.update({"pytorch-lightning_version": "zz"}), "it says it is of Lightning zz"),
    "an old Lightning": (lambda c: c.update({"pytorch-lightning_version": "0.0.1"}), "it says it is of Lightning 0.0.1"),
    "a long Lightning": (lambda c: c.update({"pytorch-lightning_version": "1" * 10**6}), "it says it is of Lightning 111"),
    "text as callbacks": (lambda c: c.update(callbacks="x"), "no dict of their states"),
    "numbers as callbacks": (lambda c: c.update(callbacks=dict.fromkeys(c["callbacks"], 3)), "no dict of their states"),
    "a strange Health": (lambda c: c["callbacks"].update(Health={"x": 1}), "state of Health cannot be taken over"),
    "a skipping Health": (lambda c: c["callbacks"].update(Health={"skipped": "x"}), "must be a number of steps"),
    "a strange monitor": (lambda c: c["callbacks"].update(TrainingMonitor={"window": [[1.0]]}), "must be rows of"),
    "text in a monitor": (lambda c: c["callbacks"].update(TrainingMonitor={"window": "xy"}), "must be rows of"),
    "an empty average": (lambda c: average(c).clear(), "the average ema differs"),
    "a giant average": (averaged(lambda v: HUGE), "is (1000000, 1000000), not"),
    "an average in one place": (averaged(spread), "is no dense tensor"),
    "an average of other numbers": (averaged(lambda v: v.half()), "is float16, not float32"),
    "an average that is infinite": (averaged(lambda v: v + torch.inf), "holds values that are not finite"),
    "an average too many": (lambda c: c["ema"].update(other={}), "the average other differs"),
    "weights that are not finite": (lambda c: c["state_dict"][first(c["state_dict"])].fill_(torch.nan), "not finite"),
    "unknown weights": (lambda c: c["state_dict"].update(x=torch.zeros(1)), "the network differs: x is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD)
def test_a_bad_one_is_refused(change, said, saved):
    with pytest.raises(ConfigError) as caught:
        checked(saved, change)
    message = str(caught.value)
    assert message.startswith("resume=x: ")
    assert said in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "optimizer",
    [
        {"_target_": "torch.optim.SGD", "lr": 0.1},
        {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        {"_target_": "torch.optim.AdamW", "lr": 0.1, "amsgrad": True},
        {"_target_": "torch.optim.AdamW", "lr": 1, "foreach": True},
        {"_target_": "torch.optim.AdamW", "lr": 0.1, "capturable": True},
        {"_target_": "torch.optim.Adafactor", "lr": 0.1},
        {"_target_": "torch.optim.NAdam", "lr": 0.1},
        {"_target_": "torch.optim.Rprop", "lr": 0.1},
        {"_target_": "torch.optim.RMSprop", "lr": 0.1, "momentum": 0.9, "centered": True},
    ],
    ids=lambda node: "-".join(map(str, node.values())),
)
def test_the_state_of_any_optimizer_is_compared_with_its_own(optimizer, saved):
    loaded, config, parts, _ = saved
    config = config | {"optimizer": {**optimizer, "_partial_": True}}
    _, training = make_training(config)
    module = make_module(config, parts, training, make_network(config), {})
    made = training.optimizer(list(module.parameters()))
    scheduler = module.schedule(made)
    for p in module.parameters():
        p.grad = torch.rand_like(p)
    if not optimizer.get("capturable"):  # which would not step without a GPU
        made.step()
    own = {"optimizer_states": [made.state_dict()], "lr_schedulers": [scheduler.state_dict()]}
    taken = lambda c: c.update(copy.deepcopy(own))  # noqa: E731
    checked((loaded, config, parts, training), taken)
    states = own["optimizer_states"][0]["state"]
    for key, value in states.get(0, {}).items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ConfigError, match=f"{key} of parameter 0 is not"):
                checked((loaded, config, parts, training), lambda c: (taken(c), state(c).update({key: HUGE})))  # noqa: B023


def test_the_counts_of_a_file_have_no_say(tiny_run, tmp_path):
    """Lightning's own counts follow from the step alone, whatever stands in their place."""
    rows = []
    for name, loops in (("good", None), ("bad", {}), ("odd", {"fit_loop": 3})):
        run = tmp_path / name
        shutil.copytree(tiny_run, run)
        checkpoint = newest_checkpoint(run)
        loaded = torch.load(checkpoint, weights_only=True)
        torch.save(loaded if loops is None else loaded | {"loops": loops}, checkpoint)
        done = call("train", f"run={run}", "resume=auto", *LONGER, cwd=tmp_path)
        assert done.code == 0, done.err
        rows.append(((run / "trace.csv").read_text(), load_run(newest_checkpoint(run))["loops"]))
    assert rows[0] == rows[1] == rows[2]
    whole = rows[0][1]["fit_loop"]
    assert whole["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"] == 6


def contents(folder):
    """Of all files but those that say which process holds the folder."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "replay"])
def test_commands_refuse_it_before_anything_is_made(command, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    newest = newest_checkpoint(run)
    loaded = torch.load(newest, weights_only=True)
    for entries in loaded["optimizer_states"][0]["state"].values():
        entries["exp_avg"] = torch.zeros(3, 5)  # would end the process, signal 11
    newest.unlink()
    damaged = run / "checkpoints" / "step_0000002.ckpt"
    torch.save(loaded | {"global_step": 2}, damaged)
    before = contents(tmp_path)
    options = ["resume=auto", *LONGER] if command == "train" else [f"checkpoint={damaged}"]
    done = call(command, f"run={run}", *options, cwd=tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "its optimizer's exp_avg of parameter 0 is not of the parameter's shape and kind" in done.err
    assert contents(tmp_path) == before
