from __future__ import annotations

import subprocess
from typing import Any, Literal

import pytest
import torch

from denoiselab.runs.checks import check_targets, check_types, check_value, locate
from denoiselab.runs.errors import ConfigError


class Inner:
    def __init__(self, *, depth: int = 1) -> None:
        self.depth = depth


class Outer:
    """Something a config can describe."""

    def __init__(
        self,
        *,
        rate: float,
        inner: Inner,
        size: int | list[int] = 8,
        mode: Literal["small", "large"] = "small",
        betas: tuple[float, float] = (0.9, 0.99),
        names: dict[str, float] | None = None,
        parts: list[Inner] | None = None,
        flag: bool = False,
        label: str | None = None,
        anything: Any = None,
    ) -> None:
        self.rate = rate


HERE = __name__
INNER = {"_target_": f"{HERE}.Inner"}
GOOD = {"_target_": f"{HERE}.Outer", "rate": 0.1, "inner": INNER}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rate": 1},  # an integer may stand for a number
        {"size": [8, 16]},
        {"mode": "large"},
        {"betas": [0.5, 0.6]},
        {"names": {"a": 1.0}},
        {"names": None},
        {"parts": [INNER, {**INNER, "depth": 2}]},
        {"label": "x", "flag": True},
        {"anything": {"deep": [1, "a", None]}},
    ],
)
def test_what_fits(changes):
    check_types({"group": GOOD | changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": "0.1"}, "group.rate=0.1: must be a number"),
        ({"rate": None}, "group.rate=null: must be a number"),
        ({"rate": True}, "group.rate=true: must be a number"),
        ({"rate": [0.1]}, r"group.rate=\[0.1\]: must be a number"),
        ({"size": 8.5}, "group.size=8.5: must be an integer or a list of"),
        ({"size": "8"}, "group.size=8: must be an integer or a list of"),
        ({"size": [8, "x"]}, "group.size=.*: must be an integer or a list of"),
        ({"mode": "huge"}, "group.mode=huge: must be one of small, large"),
        ({"betas": [0.5]}, r"group.betas=\[0.5\]: must be a list of"),
        ({"names": {"a": "b"}}, "group.names=.*: must be a mapping to a number or null"),
        ({"flag": 1}, "group.flag=1: must be true or false"),
        ({"flag": "yes"}, "group.flag=yes: must be true or false"),
        ({"label": 3}, "group.label=3: must be text or null"),
        ({"inner": {**INNER, "depth": 1.5}}, "group.inner.depth=1.5: must be an integer"),
        ({"parts": [INNER, {**INNER, "depth": "x"}]}, r"group.parts\[1\].depth=x: must be an integer"),
        ({"rat": 0.1}, r"group.rat=0.1: no such key; did you mean rate\? \(allowed: anything, betas, flag"),
        ({"inner": {**INNER, "zzz": None}}, r"group.inner.zzz=null: no such key \(allowed: depth\)"),
        ({"self": 1}, "group.self=1"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_types({"group": GOOD | changes})
    assert "\n" not in str(caught.value)


def test_a_missing_argument_is_named():
    node = {key: value for key, value in GOOD.items() if key != "rate"}
    with pytest.raises(ConfigError, match=f"group.rate: is missing; {HERE}.Outer needs it"):
        check_types({"group": node})
    check_types({"group": {**node, "_partial_": True}})  # the rest is given later


def test_values_inside_a_partial_are_checked_all_the_same():
    with pytest.raises(ConfigError, match="optimizer.lr=abc: must be a number"):
        check_types({"optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": "abc"}})
    with pytest.raises(ConfigError, match="optimizer.learning_rate=0.1: no such key"):
        check_types({"optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "learning_rate": 0.1}})


@pytest.mark.parametrize(
    "target", ["Outer", "", 3, None, [], f"{HERE}.Nothing", "no.such.module.Thing", f"{HERE}.GOOD"]
)
def test_targets_that_are_not_there(target):
    with pytest.raises(ConfigError, match="group._target_=") as caught:
        check_types({"group": {"_target_": target}})
    assert "\n" not in str(caught.value)


def test_locate():
    assert locate("torch.optim.AdamW", "optimizer") is torch.optim.AdamW


def test_a_value_alone():
    check_value(3, int, "seed")
    check_value(None, str | None, "name")
    with pytest.raises(ConfigError, match="seed=abc: must be an integer"):
        check_value("abc", int, "seed")


def test_the_projects_own_pieces_are_trusted():
    check_targets(
        {
            "backbone": {"_target_": "denoiselab.backbones.unet.UNet"},
            "objective": {"path": {"_target_": "denoiselab.diffusion.paths.RectifiedFlow"}},
            "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True},
            "callbacks": [{"_target_": "denoiselab.training.monitor.TrainingMonitor"}],
            "plain": {"list": [1, "os.system", None]},
        },
        [],
    )


REFUSED = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "torch.optimize.Evil",  # begins like torch.optim
    "denoiselab.backbonesx.Evil",
    "denoiselab.runs.folder.subprocess.run",
    "denoiselab.runs.folder.git_state",  # runs commands
    "denoiselab.runs.launch.launch",
    "denoiselab.app.train.train",
    "denoiselab.training.checkpoint.torch.load",
    "denoiselab.training.checkpoint.Path",  # a trusted module's import of something else
    "denoiselab.training.checkpoint.os.remove",
    "denoiselab.evaluation.generate.dist.init_process_group",
    "torch.optim.lr_scheduler.partial",
    "os",
    "",
    None,
    3,
    ["os.system"],
    {"_target_": "os.system"},
]


@pytest.mark.parametrize("target", REFUSED, ids=str)
@pytest.mark.parametrize(
    "place",
    [
        lambda node: {"group": node},
        lambda node: {"group": {"deep": [1, {"deeper": [node]}]}},
        lambda node: {"group": {"_target_": "denoiselab.training.ema.EMA", "decays": node}},
        lambda node: {"group": {"_args_": [node]}},
    ],
    ids=["top", "deep", "argument", "args"],
)
def test_other_targets_are_refused_without_being_run(monkeypatch, target, place):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("was run"))
    with pytest.raises(ConfigError, match=r"_target_=.*(not trusted|cannot be imported)") as caught:
        check_targets(place({"_target_": target, "command": "touch x"}), [])
    assert "\n" not in str(caught.value)


def test_a_refused_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="hostile_module.Thing: is not trusted"):
        check_targets({"a": {"_target_": "hostile_module.Thing"}}, [])
    with pytest.raises(SystemExit, match="imported"):
        check_targets({"a": {"_target_": "hostile_module.Thing"}}, ["hostile_module"])


def test_users_add_their_own_packages():
    node = {"group": {"_target_": f"{HERE}.Outer"}}
    with pytest.raises(ConfigError, match=f"group._target_={HERE}.Outer: is not trusted"):
        check_targets(node, [])
    check_targets(node, [HERE])
    with pytest.raises(ConfigError, match="os.system"):
        check_targets({"group": {"_target_": "os.system"}}, [HERE])


# A checkpoint is no YAML: weights_only=True lets tuples through, and Hydra builds what is inside them.
def test_a_tuple_hides_nothing():
    with pytest.raises(ConfigError, match="not trusted"):
        check_targets({"group": ({"_target_": "torch.load", "f": "evil.pt", "weights_only": False},)}, [])


@pytest.mark.parametrize(
    "text",
    ["${oc.create:'{_target_: torch.load, f: evil.pt, weights_only: false}'}", "${oc.env:HOME}", "a/${oc.env:HOME}"],
)
def test_an_interpolation_in_a_stored_config_is_refused(text):
    with pytest.raises(ConfigError, match="group.path="):
        check_targets({"group": {"path": text}}, [])
