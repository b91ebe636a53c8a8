from __future__ import annotations

import inspect
import subprocess
from pathlib import Path

import pytest
import yaml

from denoiselab.runs import trust
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.trust import FUNCTIONS, check_plain, check_targets, resolve

HERE = __name__
CONF = Path(__file__).parents[2] / "conf"


class Mine:
    pass


def my_function():
    return Mine()


def nodes_of_conf():
    """Every node with a `_target_` in the shipped YAML files."""

    def inside(value):
        if isinstance(value, dict):
            if isinstance(value.get("_target_"), str):
                yield value
            value = list(value.values())
        for part in value if isinstance(value, list) else ():
            yield from inside(part)

    for path in sorted(CONF.rglob("*.yaml")):
        yield from inside(yaml.safe_load(path.read_text()))


def test_the_functions_that_are_admitted_are_those_that_the_yaml_files_name():
    found = {}
    for node in nodes_of_conf():
        thing = resolve(node["_target_"])
        if inspect.isfunction(thing) and node["_target_"].split(".")[1] != "reports":
            name = f"{thing.__module__}.{thing.__qualname__}"
            found[name] = found.get(name, True) and node.get("_partial_", False)
    assert found == FUNCTIONS


def test_all_that_the_yaml_files_of_a_run_name_is_admitted():
    elsewhere = (".reports.", "hydra_plugins.")  # of studies, and of how sweeps are started
    nodes = [node for node in nodes_of_conf() if not any(word in node["_target_"] for word in elsewhere)]
    assert len(nodes) > 100
    for node in nodes:
        check_targets({key: value for key, value in node.items() if key in ("_target_", "_partial_")}, [])


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.StepLR",
        "torchmetrics.classification.BinaryAccuracy",
        "torchmetrics.MeanMetric",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
        "denoiselab.diffusion.samplers.Heun",  # from the package's own names
        "denoiselab.training.checkpoint.Checkpoints",  # as older checkpoints name it
    ],
)
def test_what_is_admitted(target):
    check_targets({"a": [{"_target_": target}]}, [])


REFUSED = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Linear",  # of any size
    "torch.nn.Transformer",
    "torch.nn.functional.relu",
    "torch.nn.parallel.DistributedDataParallel",
    "torch.nn.init.torch.load",
    "torch.optim.AdamW.step",
    "torch.optim.AdamW.__class__",
    "torch.optim.__class__",
    "torch.optim.__loader__",
    "torch.optim.adamw.__builtins__",
    "torch.optimize.Evil",  # begins like torch.optim
    "torch.optim.lr_scheduler.partial",
    "torchmetrics.image.FrechetInceptionDistance",  # fetches a network when it is built
    "torchmetrics.multimodal.CLIPScore",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.callbacks.spike.SpikeDetection",
    "lightning.pytorch.callbacks.model_checkpoint.os.remove",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.Trainer",
    "denoiselab.backbonesx.Evil",
    "denoiselab.runs.folder.subprocess.run",
    "denoiselab.runs.folder.git_state",  # runs commands
    "denoiselab.runs.launch.launch",
    "denoiselab.app.train.train",
    "denoiselab.training.checkpoint.torch.load",
    "denoiselab.training.checkpoint.load_checkpoint",
    "denoiselab.training.checkpoint.Path",  # a trusted module's import of something else
    "denoiselab.training.checkpoint.os.remove",
    "denoiselab.training.wandb_run.start_wandb",
    "denoiselab.training.logs.WandbLogger",
    "denoiselab.training.ema.EMA.update",
    "denoiselab.training.ema",
    "denoiselab.evaluation.writing.write_npz",
    "denoiselab.evaluation.generate.dist.init_process_group",
    "denoiselab.evaluation.nothing.Here",
    "denoiselab.data.",
    "denoiselab..data.digits.Digits",
    "os",
    "",
    "torch.optim",
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
        lambda node: {"group": {"parts": [node | {"_partial_": True}]}},
    ],
    ids=["top", "deep", "argument", "partial"],
)
def test_other_targets_are_refused_without_being_run(monkeypatch, target, place):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("was run"))
    with pytest.raises(
        ConfigError, match=r"_target_.*(not trusted|cannot be imported|must be the full name)"
    ) as caught:
        check_targets(place({"_target_": target, "command": "touch x"}), [])
    assert "\n" not in str(caught.value)


def test_a_logger_is_not_called_at_once():
    node = {"_target_": "denoiselab.training.logs.wandb_logger", "run_dir": "x", "name": "y"}
    with pytest.raises(ConfigError, match="codec._target_=.*wandb_logger: needs _partial_: true"):
        check_targets({"codec": node}, [])
    check_targets({"logger": node | {"_partial_": True}}, [])


def test_a_refused_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("hostile_module.Thing", "hostile_module.torch.optim.Adam"):
        with pytest.raises(ConfigError, match=f"{target}: is not trusted"):
            check_targets({"a": {"_target_": target}}, [])
    with pytest.raises(SystemExit, match="imported"):
        check_targets({"a": {"_target_": "hostile_module.Thing"}}, ["hostile_module"])


def test_a_module_under_an_admitted_name_is_not_followed(monkeypatch):
    import torch.optim

    monkeypatch.setattr(torch.optim, "tools", subprocess, raising=False)
    with pytest.raises(ConfigError, match="torch.optim.tools is no module of its own"):
        check_targets({"a": {"_target_": "torch.optim.tools.Popen"}}, [])
    monkeypatch.setattr(Mine, "__module__", "torch.optim")  # it says so, but is not there
    monkeypatch.setattr(torch.optim, "Mimic", Mine, raising=False)
    with pytest.raises(ConfigError, match="not trusted"):
        check_targets({"a": {"_target_": "torch.optim.Mimic"}}, [])


def test_users_add_their_own_packages():
    for name in ("Mine", "my_function"):
        node = {"group": {"_target_": f"{HERE}.{name}"}}
        with pytest.raises(ConfigError, match=f"group._target_={HERE}.{name}: is not trusted"):
            check_targets(node, [])
        check_targets(node, [HERE])
    for target in ("os.system", f"{HERE}.subprocess.run", f"{HERE}.Path"):
        with pytest.raises(ConfigError, match=r"_target_="):
            check_targets({"group": {"_target_": target}}, [HERE])


def test_layers_of_torch_come_in_by_name():
    check_targets({"group": {"_target_": "torch.nn.Linear"}}, ["torch.nn"])


def test_a_config_of_which_nothing_is_built_may_name_anything():
    check_plain({"group": {"_target_": "somebody.Else", "_partial_": True, "x": [1, None, "y"]}})


def test_a_file_cannot_trust_by_itself():
    with pytest.raises(ConfigError, match="not trusted"):
        check_targets({"trust": ["os", HERE], "group": {"_target_": f"{HERE}.Mine"}}, [])


@pytest.mark.parametrize("name", ["", "my-package", "a b", "../x", "my."])
def test_what_is_trusted_is_a_package(name):
    with pytest.raises(ConfigError, match="trust=.*must be names of packages"):
        check_targets({}, [name])


class Text(str):
    pass


# A checkpoint is no YAML: weights_only=True lets much through.
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("${oc.create:'{_target_: torch.load, f: evil.pt, weights_only: false}'}", "must be resolved"),
        ("a/${oc.env:HOME}", "must be resolved"),
        ("???", "is missing"),
        (({"_target_": "torch.load", "f": "evil.pt", "weights_only": False},), "must be plain data, not tuple"),
        ({1, 2}, "must be plain data, not set"),
        (b"bytes", "must be plain data, not bytes"),
        (1j, "must be plain data, not complex"),
        (Text("x"), "must be plain data, not Text"),
        (2**63, "64 bits"),
        (-(10**5000), "64 bits"),
        ("x" * 10**6, "at most"),
        ({1: 2}, "its key of type int must be a short text"),
        ({("a",): 2}, "its key of type tuple must be a short text"),
        ({10**5000: 2}, "its key of type int must be a short text"),
        ({"a\nb": 2}, r"its key a\\nb must be a short text"),
        ({"\x1b[2J": 2}, r"its key \\x1b\[2J must be a short text"),
        ({"x" * 10**6: 2}, "must be a short text"),
        ({"_args_": ["touch x"]}, r"_args_: is not allowed"),
        ({"_recursive_": False}, "_recursive_: is not allowed"),
        ({"_convert_": "object"}, "_convert_: is not allowed"),
        ({"_target_": "torch.optim.Adam", "_partial_": "yes"}, "_partial_: must be true or false"),
        ([0] * (trust.LONGEST_LIST + 1), "must hold at most"),
        ({f"x{i}": 0 for i in range(trust.LONGEST_LIST + 1)}, "must hold at most"),
        ([[0] * trust.LONGEST_LIST] * (trust.MOST // trust.LONGEST_LIST + 1), "holds too much"),
    ],
    ids=lambda v: str(v)[:30] if not isinstance(v, int | dict) else type(v).__name__,
)
def test_what_is_no_plain_config(value, problem):
    for check in (lambda config: check_targets(config, []), check_plain):
        if "_partial_" in problem and check is check_plain:
            continue
        with pytest.raises(ConfigError, match=rf"group.path.*{problem}") as caught:
            check({"group": {"path": value}})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_deep_circular_and_unfolding_configs():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    circle = {}
    circle["again"] = [circle]
    unfolding = [0]
    for _ in range(30):
        unfolding = [unfolding] * 10
    for value, problem in ((deep, "nested too deep"), (circle, "nested too deep"), (unfolding, "holds too much")):
        with pytest.raises(ConfigError, match=problem) as caught:
            check_targets({"group": value}, [])
        assert len(str(caught.value)) < 400
