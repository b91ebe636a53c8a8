"""Which keys of a config may change when a run goes on."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from denoiselab.app.compose import config_folder
from denoiselab.runs.changes import below, check_changes, differences, flatten
from denoiselab.runs.errors import ConfigError

RUN = {
    "seed": 0,
    "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]},
    "callbacks": {"checkpoints": {"_target_": "denoiselab.training.saving.Checkpoints", "every": 3}},
    "run": None,
}
# Of the default config: what may change without a word. All the rest decides what the network becomes.
MAY_CHANGE = [
    *("allow", "name", "resume", "run", "runs", "trust", "compile", "init_from", "init_weights"),
    *("callbacks", "guidance", "logger", "metrics", "sampler"),
    *("datamodule.eval_batch_size", "datamodule.num_workers"),
    *("trainer.accelerator", "trainer.accumulate", "trainer.devices", "trainer.max_steps", "trainer.num_nodes"),
    *("trainer.threads", "trainer.val_every"),
]
MUST_NOT = [
    *("seed", "augmentation", "backbone", "codec", "ema", "objective", "optimizer", "schedule"),
    *("datamodule._target_", "datamodule.channels", "datamodule.resolution", "datamodule.num_classes"),
    *("datamodule.batch_size", "datamodule.seed", "datamodule.flip", "datamodule.train_size"),
    *("trainer._target_", "trainer.precision", "trainer.gradient_clip"),
]


def default():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return OmegaConf.to_container(compose("train"), resolve=True)


def changed(config, key, value):
    """A config with another value at a dotted key."""
    first, _, rest = key.partition(".")
    return config | {first: changed(config[first], rest, value) if rest else value}


def test_leaves():
    assert flatten(RUN) == {
        "seed": 0,
        "optimizer.lr": 0.1,
        "optimizer.betas": [0.9, 0.99],
        "callbacks.checkpoints._target_": "denoiselab.training.saving.Checkpoints",
        "callbacks.checkpoints.every": 3,
        "run": None,
    }
    assert flatten({"a": {}, 3: {"b": 1}}) == {"a": {}, "3.b": 1}


def test_differences_are_shown_as_one_types_them():
    new = changed(changed(RUN, "optimizer.lr", None), "seed", False)  # equal to 0 in Python, and yet another value
    del new["callbacks"]
    new["extra"] = {"name": "a b"}
    assert differences(RUN, new) == {
        "callbacks.checkpoints._target_": ("denoiselab.training.saving.Checkpoints", "absent"),
        "callbacks.checkpoints.every": ("3", "absent"),
        "extra.name": ("absent", "a b"),
        "optimizer.lr": ("0.1", "null"),
        "seed": ("0", "false"),
    }
    assert differences(RUN, RUN) == {}


@pytest.mark.parametrize("pair", [(1, 1.0), (float("nan"), float("nan")), ([1, None], [1, None])], ids=str)
def test_the_same_is_no_difference(pair):
    assert differences({"a": pair[0]}, {"a": pair[1]}) == {}


@pytest.mark.parametrize(
    ("key", "answer"), [("a.b", True), ("a.b.c", True), ("a.bc", False), ("a", False), ("x.a.b", False), ("d", True)]
)
def test_below(key, answer):
    assert below(key, ["a.b", "d"]) is answer


def test_a_harmless_change_is_told():
    new = changed(changed(RUN, "callbacks.checkpoints.every", 5), "run", "somewhere")
    assert check_changes(RUN, new, []) == ["callbacks.checkpoints.every 3 → 5"]


def test_all_that_is_refused_is_named_with_the_way_out():
    new = changed(changed(changed(RUN, "optimizer.lr", 0.2), "seed", 1), "callbacks.checkpoints.every", 5)
    line = (
        "resume: optimizer.lr 0.1 → 0.2, seed 0 → 1: would change what the run means; to do so all the same, "
        "allow=[optimizer.lr,seed]"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        check_changes(RUN, new, [])
    with pytest.raises(ConfigError, match=re.escape("allow=[seed]")):
        check_changes(RUN, new, ["optimizer"])
    with pytest.raises(ConfigError, match=re.escape("allow=[optimizer.lr]")):
        check_changes(RUN, new, ["seed", "optimizer.l", "lr"])
    assert len(check_changes(RUN, new, ["seed", "optimizer.lr"])) == 3


LIGHTNING = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    ("target", "free"),
    [
        ("denoiselab.training.pictures.SampleGrid", True),
        (f"{LIGHTNING}.LearningRateMonitor", True),
        (f"{LIGHTNING}.early_stopping.EarlyStopping", True),
        (f"{LIGHTNING}.StochasticWeightAveraging", False),
        (f"{LIGHTNING}.weight_averaging.WeightAveraging", False),
        (f"{LIGHTNING}.GradientAccumulationScheduler", False),
        ("mypackage.Timer", False),
        ("denoiselaboratory.Timer", False),
        (3, False),
        (None, False),
    ],
)
def test_a_callback_that_may_change_training_is_no_free_change(target, free):
    given = {"_target_": target, "x": 1}
    pairs = [
        (RUN, changed(RUN, "callbacks.more", given)),
        (changed(RUN, "callbacks.more", given), RUN),
        (changed(RUN, "callbacks.more", given), changed(RUN, "callbacks.more", None)),
        (changed(RUN, "callbacks.more", given), changed(RUN, "callbacks.more", given | {"x": 2})),
        (changed(RUN, "callbacks.checkpoints", given), RUN),
        (changed(RUN, "callbacks", {"more": given}), changed(RUN, "callbacks", None)),
    ]
    for old, new in pairs:
        if free:
            assert check_changes(old, new, [])
        else:
            with pytest.raises(ConfigError, match=r"^resume: .*callbacks\..*would change what the run means"):
                check_changes(old, new, [])
            assert check_changes(old, new, ["callbacks"])


def test_what_comes_or_goes_is_a_change():
    new = changed(RUN, "optimizer", {"lr": 0.1, "momentum": 0.9})
    with pytest.raises(
        ConfigError, match=re.escape("optimizer.betas [0.9, 0.99] → absent, optimizer.momentum absent → 0.9")
    ):
        check_changes(RUN, new, [])


def test_each_key_of_a_run_is_free_or_refused():
    config = default()
    leaves = flatten(config)
    free = []
    for key in leaves:
        try:
            check_changes(config, changed(config, key, "another"), [])
            free.append(key)
        except ConfigError as error:
            assert f"allow=[{key}]" in str(error)  # noqa: PT017
            assert check_changes(config, changed(config, key, "another"), [key])
    kinds = [key for key in leaves if re.fullmatch(r"callbacks\.\w+\._target_", key)]  # of "another", nothing is known
    assert free == [key for key in leaves if below(key, MAY_CHANGE) and key not in kinds]
    assert sorted({*leaves} - {*free}) == sorted(key for key in leaves if below(key, MUST_NOT) or key in kinds)
    for name in (*MAY_CHANGE, *MUST_NOT):  # nothing stands in the tables that is not in the config
        assert any(below(key, [name]) for key in leaves), name


@pytest.mark.parametrize("key", ["root", "test_root", "cache", "download"])
def test_data_may_move(key):
    old = {"datamodule": {key: "here"}}
    assert check_changes(old, {"datamodule": {key: "there"}}, []) == [f"datamodule.{key} here → there"]
