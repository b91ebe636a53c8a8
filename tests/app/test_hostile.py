"""Whatever a checkpoint from elsewhere holds: it ends in one line that names the culprit, runs nothing and fills no memory."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zipfile
from functools import partial

import hostile
import pytest
import torch
from calls import call, composed, files_below, run_script
from hostile import FILE, good, isolated, isolated_each, options, pickled_call, training, write_pickle

from denoiselab.app.build import make_parts, make_training
from denoiselab.app.convert import convert
from denoiselab.app.evaluate import evaluate
from denoiselab.app.frontier import frontier
from denoiselab.app.replay import replay
from denoiselab.app.sample import sample
from denoiselab.app.trained import load_trained, without_consent
from denoiselab.runs.errors import ConfigError

TOUCH = "touch harmed"
IN = "denoiselab."


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What the children would otherwise do again and again."""
    good(), options("sample"), options("evaluate"), training()


def to_sample(file):
    sample(options("sample", checkpoint=file, output="drawn.png", num_samples=2), {}, [])


def to_evaluate(file):
    evaluate(options("evaluate", checkpoint=file), {}, [])


def to_start_from(file):
    make_training(training(init_from=file))


def to_guide(file):
    autoguidance = {"_target_": f"{IN}diffusion.guidance.Autoguidance", "_partial_": True, "scale": 2.0, "guide": file}
    make_parts(training(guidance=autoguidance))


def to_frontier(file):
    frontier(options("frontier", checkpoint=file, output="drawn"), {"logger": "none", "guidance": "none"}, [])


def to_convert(file):
    convert({k: v for k, v in options("convert", checkpoint=file, to="safetensors").items() if k != "device"}, {}, [])


READERS = (to_sample, to_start_from, to_guide)
BUILDERS = (to_sample, to_guide)


def refused(tmp_path, words, readers, file=FILE):
    """Each reader of the file ends in one line that holds the words, and nothing else happens."""
    before = files_below(tmp_path)
    outcomes = isolated_each([partial(reader, file) for reader in readers], tmp_path)
    for reader, found in zip(readers, outcomes, strict=True):
        assert found.kind == "ConfigError", f"{reader.__name__}: {found.kind}: {found.message}"
        assert "\n" not in found.message
        assert found.message.isprintable()
        assert len(found.message) < 600, "a line that nobody reads"
        for word in words:
            assert word in found.message, f"{reader.__name__}: {word!r} is not in {found.message!r}"
        assert found.bytes < 200e6, f"{reader.__name__} took {found.bytes / 1e6:.0f} MB"
    assert files_below(tmp_path) == before


def test_a_good_checkpoint_is_taken(tmp_path):
    torch.save(good(), tmp_path / FILE)
    for reader in READERS:
        assert isolated(partial(reader, FILE), tmp_path)[:2] == ("", "")
    assert "drawn.png" in files_below(tmp_path)


def test_the_child_process_tells_what_happens_in_it(tmp_path):
    def harm():
        (tmp_path / "harmed").touch()
        raise KeyError("two\nlines")

    assert isolated(harm, tmp_path).kind == "KeyError"
    assert files_below(tmp_path) == ["harmed"]
    assert isolated(lambda: bytearray(3 << 30), tmp_path).kind == "MemoryError"
    assert isolated(lambda: bytearray(b"x") * (300 << 20), tmp_path).bytes > 250e6
    assert isolated(lambda: os._exit(3), tmp_path).kind == "died"


# --- configs ---

CALLS = {
    "os.system": {"command": TOUCH},
    "posix.system": {"command": TOUCH},
    "os.popen": {"cmd": TOUCH},
    "os.execvp": {"file": "touch", "args": ["touch", "harmed"]},
    "os.mkdir": {"path": "harmed"},
    "subprocess.run": {"args": ["touch", "harmed"]},
    "subprocess.Popen": {"args": ["touch", "harmed"]},
    "subprocess.check_output": {"args": ["touch", "harmed"]},
    "subprocess.getoutput": {"cmd": TOUCH},
    "builtins.eval": {"source": "open('harmed', 'w')"},
    "builtins.exec": {"source": "open('harmed', 'w')"},
    "builtins.open": {"file": "harmed", "mode": "w"},
    "builtins.__import__": {"name": "antigravity"},
    "builtins.compile": {"source": "1", "filename": "x", "mode": "eval"},
    "builtins.getattr": {"_args_": [{"_target_": "importlib.import_module", "name": "os"}, "system"]},
    "importlib.import_module": {"name": "harmful"},
    "runpy.run_path": {"path_name": "harmful.py"},
    "pathlib.Path.touch": {"self": "harmed"},
    "shutil.rmtree": {"path": "."},
    "shutil.copy": {"src": FILE, "dst": "harmed"},
    "pickle.loads": {"_args_": ["cos\nsystem\n(S'touch harmed'\ntR."]},
    "ctypes.CDLL": {"name": "libc.so.6"},
    "urllib.request.urlretrieve": {"url": f"file:{FILE}", "filename": "harmed"},
    "functools.partial": {"_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}, TOUCH]},
    "functools.reduce": {"_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}, [TOUCH]]},
    "operator.methodcaller": {"_args_": ["system", TOUCH]},
    "operator.attrgetter": {"_args_": ["system"]},
    "hydra.utils.get_method": {"path": "os.system"},
    "hydra.utils.get_class": {"path": "subprocess.Popen"},
    "hydra.utils.get_object": {"path": "os.system"},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": TOUCH}},
    "hydra.utils.call": {"config": {"_target_": "os.system", "command": TOUCH}},
    "hydra._internal.utils._locate": {"path": "os.system"},
    "omegaconf.OmegaConf.create": {"obj": "${oc.env:HOME}"},
    "torch.load": {"f": FILE, "weights_only": False},
    "torch.save": {"obj": 1, "f": "harmed"},
    "torch.hub.load": {"repo_or_dir": ".", "model": "evil", "source": "local"},
    "torch.hub.download_url_to_file": {"url": f"file:{FILE}", "dst": "harmed"},
    "torch.jit.load": {"f": FILE},
    "torch.utils.cpp_extension.load": {"name": "harmed", "sources": ["x.cpp"]},
    "torch.nn.Module.__init_subclass__": {},
    "torch.optim.AdamW.__init__.__globals__.get": {"_args_": ["os"]},
    "numpy.save": {"file": "harmed", "arr": [1]},
    "lightning.pytorch.Trainer": {"default_root_dir": "harmed"},
    "lightning.pytorch.callbacks.ModelCheckpoint": {"dirpath": "harmed"},
    "lightning.pytorch.loggers.CSVLogger": {"save_dir": "harmed"},
    "torchmetrics.image.fid.FrechetInceptionDistance": {},
    "denoiselab.runs.folder.subprocess.run": {"args": ["touch", "harmed"]},
    "denoiselab.runs.files.write_json": {"path": "harmed", "value": 1},
    "denoiselab.training.checkpoint.os.remove": {"path": FILE},
    "denoiselab.training.checkpoint.torch.load": {"f": FILE, "weights_only": False},
    "denoiselab.training.checkpoint.load_checkpoint": {"path": FILE},
    "denoiselab.training.checkpoint_io.write_checkpoint": {"checkpoint": {}, "path": "harmed"},
    "denoiselab.training.wandb_run.start_wandb": {"folder": "harmed", "id": "x", "job_type": "x"},
    "denoiselab.training.logs.WandbLogger": {"project": "harmed"},
    "denoiselab.evaluation.writing.remove_partial": {"folder": "."},
    "denoiselab.app.train.train": {"config": {}, "choices": {}, "overrides": []},
    "denoiselab_evil.Sampler": {},
    "hostile.pickled_call": {"module": "os", "name": "system"},
}


@pytest.mark.parametrize(("target", "arguments"), CALLS.items(), ids=CALLS)
def test_calls(target, arguments, tmp_path):
    checkpoint = good()
    checkpoint["config"]["sampler"] = {"_target_": target, **arguments}
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, [f"sampler._target_={target}: "], BUILDERS)


@pytest.mark.parametrize("target", ["os.system", "functools.partial", "hydra.utils.get_method", "torch.load"])
def test_calls_that_are_only_prepared(target, tmp_path):
    checkpoint = good()
    checkpoint["config"]["sampler"] = {"_target_": target, "_partial_": True, **CALLS[target]}
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, [f"sampler._target_={target}: "], BUILDERS)


EVIL = {"_target_": "os.system", "command": TOUCH}
PLACES = {
    "a group that sampling does not need": ({"optimizer": EVIL}, "optimizer._target_=os.system"),
    "a key that nobody knows": ({"x": {"deep": [{"er": [EVIL]}]}}, "x.deep[0].er[0]._target_=os.system"),
    "an argument": ({"codec": {"_target_": f"{IN}codecs.rgb.RGB", "x": EVIL}}, "codec.x._target_=os.system"),
    "below _args_": ({"codec": {"_target_": f"{IN}codecs.rgb.RGB", "_args_": [EVIL]}}, "codec._args_: "),
    "unbuilt": ({"codec": {"_target_": f"{IN}codecs.rgb.RGB", "_recursive_": False}}, "codec._recursive_: "),
    "a tuple": ({"x": (EVIL,)}, "x: must be plain data, not tuple"),
    "an ordered dict": ({"x": collections.OrderedDict(EVIL)}, "x: must be plain data, not OrderedDict"),
    "another sort of the same": ({"sampler": {"_target_": ["os.system"]}}, "sampler._target_: must be the full name"),
    "text that becomes one": ({"x": "${oc.create:'{_target_: os.system}'}"}, "x=${oc.create"),
    "text from the environment": ({"runs": "${oc.env:HOME}"}, "runs=${oc.env:HOME}: must be resolved"),
    "its own word": ({"trust": ["os", "posix"], "sampler": EVIL}, "sampler._target_=os.system: is not trusted"),
    "a logger at once": (
        {"codec": {"_target_": f"{IN}training.logs.wandb_logger", "run_dir": "harmed", "name": "x"}},
        "codec._target_=denoiselab.training.logs.wandb_logger: needs _partial_: true",
    ),
    "a logger as guidance": (
        {"guidance": {"_target_": f"{IN}training.logs.wandb_logger", "_partial_": True}},
        "guidance._target_=denoiselab.training.logs.wandb_logger: must be something that makes a Denoiser",
    ),
    "a logger in a chain": (
        {
            "guidance": {
                "_target_": f"{IN}diffusion.guidance.chain",
                "_partial_": True,
                "parts": {"a": {"_target_": f"{IN}training.logs.no_logger", "_partial_": True}},
            }
        },
        "guidance.parts.a._target_=denoiselab.training.logs.no_logger: must be something that makes a Denoiser",
    ),
    "a part in another's place": (
        {"codec": {"_target_": f"{IN}training.ema.EMA", "decays": {}}},
        "codec._target_=denoiselab.training.ema.EMA: must be a Codec",
    ),
    "a part that is not built": (
        {"codec": {"_target_": f"{IN}codecs.rgb.RGB", "_partial_": True}},
        "codec._target_=denoiselab.codecs.rgb.RGB: must be a Codec",
    ),
    "an abstract part": ({"sampler": {"_target_": f"{IN}diffusion.samplers.base.Sampler"}}, "sampler.grid: is missing"),
    "an interpolated key": ({"x": {"a\nb": 1}}, "its key a\\nb must be a short text"),
    "colours": ({"sampler": {"_target_": "\x1b[31mos.system"}}, "sampler._target_=\\x1b[31mos.system"),
    "keys that are no text": ({"x": {3: 4}}, "x: its key of type int"),
    "a tensor": ({"x": torch.zeros(1).expand(10**12)}, "x: must be plain data, not Tensor"),
    "a long text": ({"name": "x" * 10**6}, "name="),
    "a large number": ({"seed": 2**600}, "seed: must be an integer of 64 bits"),
    "a number in place of a group": ({"backbone": 3}, "backbone"),
    "no seed": ({"seed": "x"}, "seed"),
    "a negative seed": ({"seed": -1}, "seed"),
    "a wrong type": ({"backbone": {"_target_": f"{IN}backbones.unet.UNet", "width": "8"}}, "backbone.width=8"),
}


@pytest.mark.parametrize(("changes", "words"), PLACES.values(), ids=PLACES)
def test_places(changes, words, tmp_path):
    checkpoint = good()
    checkpoint["config"] |= changes
    torch.save(checkpoint, tmp_path / FILE)
    only_sampled = {"guidance", "codec", "sampler"} & set(changes) and "trusted" not in words
    refused(tmp_path, [words], [to_sample] if only_sampled or "seed" in changes else BUILDERS)


@pytest.mark.parametrize("reader", [to_sample, to_evaluate, to_frontier, to_convert, to_guide])
def test_no_command_asks_a_file_whom_to_trust(reader, tmp_path):
    checkpoint = good()
    checkpoint["config"] |= {"trust": ["hostile", "os", "posix"]}
    checkpoint["config"]["backbone"] = {"_target_": "hostile.pickled_call", "module": "os", "name": "system"}
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, ["backbone._target_=hostile.pickled_call: is not trusted"], [reader])


def to_replay(folder):
    replay({key: value for key, value in options("replay", run=folder).items() if key != "device"}, {}, [])


def test_a_run_folder_has_no_say_in_whom_its_guide_trusts(tmp_path):
    guide = good()
    guide["config"]["objective"]["path"] = {"_target_": "hostile.pickled_call", "module": "os", "name": "system"}
    torch.save(guide, tmp_path / FILE)
    autoguidance = {"_target_": f"{IN}diffusion.guidance.Autoguidance", "_partial_": True, "scale": 2.0, "guide": FILE}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(training(guidance=autoguidance, trust=["hostile"])))
    (folder / "starts.jsonl").write_text(json.dumps({"data": {"train": "x", "test": "x"}}) + "\n")
    (folder / "trace.csv").write_text("step,loss,grad_norm,samples\n1,1.0,1.0,3\n")
    refused(tmp_path, ["guidance.guide", "hostile.pickled_call: is not trusted"], [to_replay], "run")


@pytest.mark.parametrize("value", [None, [], "config", 3, {}], ids=repr)
def test_no_config(value, tmp_path):
    torch.save(good() | {"config": value}, tmp_path / FILE)
    refused(tmp_path, ["config"], BUILDERS)


def test_a_deep_config(tmp_path):
    deep = []
    for _ in range(200):
        deep = [deep]
    torch.save(good() | {"config": {"x": deep}}, tmp_path / FILE)
    refused(tmp_path, ["x[0]", "nested too deep"], [to_sample])


def test_circular_and_unfolding_configs(tmp_path):
    circle = good()
    circle["config"]["x"] = circle["config"]
    torch.save(circle, tmp_path / FILE)
    refused(tmp_path, ["nested too deep"], BUILDERS)
    for levels, words in ((5, ["x", "holds too much"]), (30, ["unfolds to more than"])):
        torch.save(good() | {"config": {"x": unfolding(levels)}}, tmp_path / FILE)
        refused(tmp_path, words, [to_sample])


BIG = 10**9
SIZES = {
    "a wide network": ("backbone", {"width": 2**16}, "does not fit its own config"),
    "a wider network": ("backbone", {"width": 2**40}, "backbone.width"),
    "a network in many parts": ("backbone", {"blocks": BIG}, "backbone.blocks"),
    "many steps": ("sampler", {"nfe": 10**15}, "sampler.nfe"),
    "a fine table": (
        "objective",
        {"path": {"_target_": f"{IN}diffusion.paths.DDPMLinear", "steps": 10**12}},
        "objective.path.steps",
    ),
    "large images": ("datamodule", {"resolution": 2**20}, "resolution"),
    "many classes": ("datamodule", {"num_classes": 2**40}, "num_classes"),
    "a list that takes long": ("backbone", {"multipliers": [1] * 50_000}, "backbone.multipliers: must hold at most"),
    "many features": (
        "objective",
        {
            "weighting": {
                "_target_": f"{IN}diffusion.weighting.LearnedUncertainty",
                "over": {"_target_": f"{IN}diffusion.weighting.Unit"},
                "channels": 10**8,
            }
        },
        "objective.weighting.channels=100000000: must be from 1 to 65536",
    ),
    "a network of torch's": (
        "backbone",
        {"_target_": "torch.nn.Transformer", "num_encoder_layers": 10**7},
        "backbone._target_=torch.nn.Transformer: is not trusted",
    ),
    "an extractor of torch's": (
        "metrics",
        {"extractors": {"x": {"_target_": "torch.nn.Linear", "in_features": 30_000, "out_features": 30_000}}},
        "metrics.extractors.x._target_=torch.nn.Linear: is not trusted",
    ),
}


@pytest.mark.parametrize(("group", "changes", "words"), SIZES.values(), ids=SIZES)
def test_sizes_in_the_config(group, changes, words, tmp_path):
    checkpoint = good()
    checkpoint["config"][group] |= changes
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, [words], [to_sample])


# --- weights ---

NAME = "encoder"  # begins the name of some tensor


def first(state):
    return next(iter(state))


def with_first(value):
    """Changes the first tensor of the averages."""

    def change(checkpoint):
        average = checkpoint["ema"]["ema"]
        average[first(average)] = value(average[first(average)])

    return change


def unfolding(levels):
    """A list of ten times the same list of ten times the same list, and so on: few bytes, and no end of text."""
    found = ["x"] * 10
    for _ in range(levels):
        found = [found] * 10
    return found


def huge(checkpoint):
    """Tensors of giant shape over a few bytes, which the config's network has too."""
    checkpoint["config"]["backbone"]["width"] = width = 2**16
    from denoiselab.app.nodes import make_network

    network = make_network(checkpoint["config"], device="meta")
    state = {key: torch.zeros(1).expand(value.shape) for key, value in network.state_dict().items()}
    checkpoint["state_dict"] = {f"network.{key}": value for key, value in state.items()}
    checkpoint["ema"] = {"ema": dict(state)}
    assert width


WEIGHTS = {
    "a tensor is missing": (lambda c: [s.pop(first(s)) for s in (c["ema"]["ema"], c["state_dict"])], "is missing"),
    "one too many": (lambda c: c["ema"]["ema"].update(extra=torch.zeros(1)), "extra is unknown"),
    "one with an odd name": (
        lambda c: c["ema"]["ema"].update({"../\x1b[2J": torch.zeros(1)}),
        r"../\x1b[2J is unknown",
    ),
    "another shape": (with_first(lambda v: v[..., None]), "not ("),
    "a giant shape": (with_first(lambda v: torch.zeros(1).expand(10**6, 10**6)), "is (1000000, 1000000), not"),
    "giant shapes that fit": (huge, " bytes, not 3,0"),
    "integers": (with_first(lambda v: v.long()), "is int64, not float32"),
    "half": (with_first(lambda v: v.half()), "is float16, not float32"),
    "complex": (with_first(lambda v: v.to(torch.complex64)), "is complex64, not float32"),
    "booleans": (with_first(lambda v: v > 0), "is bool, not float32"),
    "not a number": (with_first(lambda v: v * float("nan")), "holds values that are not finite"),
    "infinity": (
        with_first(lambda v: v.index_fill(0, torch.tensor([0]), torch.inf)),
        "holds values that are not finite",
    ),
    "sparse": (with_first(lambda v: v.to_sparse()), "plain data"),
    "no tensor": (with_first(lambda v: 3), "is no dict of names"),
    "nested": (with_first(lambda v: {"a": v}), "is no dict of names"),
    "no names": (lambda c: c["ema"]["ema"].update({3: torch.zeros(1)}), "is no dict of names"),
    "no averages' dict": (lambda c: c.update(ema=[]), "has no ema"),
    "an average that is a tensor": (lambda c: c.update(ema={"ema": torch.zeros(3)}), "ema is no dict"),
    "no weights": (lambda c: c.update(state_dict={}, ema={}), "is missing"),
    "no state dict": (lambda c: c.pop("state_dict"), "has no state_dict"),
    "no step": (lambda c: c.pop("global_step"), "has no global_step"),
    "a step that is a path": (lambda c: c.update(global_step="../../x"), "has no global_step"),
    "a step before the first": (lambda c: c.update(global_step=-1), "global_step is -1"),
    "another layout": (lambda c: c.update(schema=2), "layout 2"),
    "a layout like ours": (lambda c: c.update(schema=True), "layout True"),
    "no layout": (lambda c: c.pop("schema"), "layout None"),
    "a layout that unfolds": (lambda c: c.update(schema=unfolding(5)), "layout of type list"),
    "a layout that unfolds without end": (lambda c: c.update(schema=unfolding(30)), "unfolds to more than"),
    "a step of many digits": (lambda c: c.update(global_step=10**600), "global_step is of type int"),
}


@pytest.mark.parametrize(("change", "words"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(change, words, tmp_path):
    checkpoint = good()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, [words], [to_sample] if change is huge else READERS)


@pytest.mark.parametrize(
    "name", ["../../harmed", "/harmed", "a/b", "..", ".hidden", "", "a\0b", "a\nb", "x" * 300, "é"]
)
def test_names_of_averages(name, tmp_path):
    checkpoint = good()
    checkpoint["ema"] = {name: checkpoint["ema"]["ema"]}
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, ["its average", "the name must be"], READERS)
    with pytest.raises(ConfigError, match="(?s)ema.decays.*the name must be"):
        make_training(training(ema={"_target_": f"{IN}training.ema.EMA", "decays": {name: 0.9}}))


def test_names_of_extractors(tmp_path):
    module = {"_target_": f"{IN}backbones.unet.UNet", "_partial_": True}
    extractor = {"_target_": f"{IN}evaluation.module_extractor.ModuleExtractor", "module": module, "name": "../x"}
    checkpoint = good()
    checkpoint["config"]["metrics"] |= {
        "extractors": {"x": extractor},
        "measures": {"x": {"_target_": f"{IN}evaluation.measures.Frechet"}},
        "counts": [4],
    }
    torch.save(checkpoint, tmp_path / FILE)
    refused(tmp_path, ["metrics.extractors.x.name=../x", "a-z, 0-9 and _"], [to_sample, to_evaluate])


# --- what only evaluation would do ---


def test_nothing_is_fetched_on_a_files_word(tmp_path):
    checkpoint = good()
    checkpoint["config"]["datamodule"] = composed("datamodule=cifar10")["datamodule"] | {
        "root": str(tmp_path / "harmed"),
        "download": True,
        "channels": 1,
        "resolution": 8,
    }
    torch.save(checkpoint, tmp_path / FILE)
    trained = load_trained(options("sample", checkpoint=str(tmp_path / FILE)), ())
    assert trained.config["datamodule"]["download"] is False
    checkpoint["config"]["metrics"] = composed("metrics=fid")["metrics"]
    extractor = checkpoint["config"]["metrics"]["extractors"]
    next(iter(extractor.values()))["allow_other_weights"] = True
    torch.save(checkpoint, tmp_path / FILE)
    trained = load_trained(options("sample", checkpoint=str(tmp_path / FILE)), ())
    assert "'allow_other_weights': True" in str(checkpoint["config"])
    assert "'allow_other_weights': True" not in str(trained.config)
    assert files_below(tmp_path) == [FILE]


def test_what_a_file_may_not_ask_for():
    cores = os.cpu_count()
    config = {
        "datamodule": {"download": True, "num_workers": 10**6, "root": "x"},
        "trainer": {"threads": 10**6, "devices": 2},
        "metrics": {"extractors": [{"allow_other_weights": True}]},
    }
    bounded = without_consent(config)
    assert bounded["datamodule"] == {"download": False, "num_workers": cores, "root": "x"}
    assert bounded["trainer"] == {"threads": cores, "devices": 2}
    assert bounded["metrics"]["extractors"] == [{"allow_other_weights": False}]
    typed = without_consent(config, ["datamodule.download=true", "++trainer.threads=1000000"])
    assert typed["datamodule"]["download"] is True
    assert (typed["datamodule"]["num_workers"], typed["trainer"]["threads"]) == (cores, 10**6)
    assert config["datamodule"]["download"] is True
    assert without_consent({"trainer": {"threads": None}, "x": 3}) == {"trainer": {"threads": None}, "x": 3}


# --- pickles ---


def nested_key(levels):
    """A dict with a tuple of ten tuples of ten tuples, and so on, as a key: hashed at every use, part by part."""
    pickled = b"\x80\x02(" + b"(" + b"K\x01" * 10 + b"t" + b"r" + (0).to_bytes(4, "little")
    for i in range(levels):
        below, this = (b"j" + i.to_bytes(4, "little")) * 10, b"r" + (i + 1).to_bytes(4, "little")
        pickled += b"(" + below + b"t" + this
    return pickled + b"}" + b"j" + levels.to_bytes(4, "little") + b"K\x01st."


PICKLES = {
    "os.system": pickled_call("os", "system", TOUCH),
    "posix.system": pickled_call("posix", "system", TOUCH),
    "subprocess.Popen": pickled_call("subprocess", "Popen", ["touch", "harmed"]),
    "builtins.eval": pickled_call("builtins", "eval", "open('harmed', 'w')"),
    "builtins.exec": pickled_call("builtins", "exec", "open('harmed', 'w')"),
    "builtins.getattr": pickled_call("builtins", "getattr", "x", "upper"),
    "builtins.bytearray": pickled_call("builtins", "bytearray", 2**40),
    "builtins.__import__": pickled_call("builtins", "__import__", "antigravity"),
    "torch.hub.load": pickled_call("torch.hub", "load", ".", "evil"),
    "torch.load": pickled_call("torch", "load", FILE),
    "torch.FloatTensor": pickled_call("torch", "FloatTensor", 2**38),
    "torch.storage.UntypedStorage": pickled_call("torch.storage", "UntypedStorage", 2**40),
    "torch._utils._rebuild_sparse_tensor": pickled_call("torch._utils", "_rebuild_sparse_tensor", 1, (2,)),
    "torch.storage._load_from_bytes": pickled_call("torch.storage", "_load_from_bytes", b"x"),
    "numpy.core.multiarray._reconstruct": pickled_call("numpy.core.multiarray", "_reconstruct", (0,), b"b"),
    "numpy._core.multiarray.scalar": pickled_call("numpy._core.multiarray", "scalar", b"b"),
    "importlib.import_module": pickled_call("importlib", "import_module", "antigravity"),
    "functools.partial": pickled_call("functools", "partial", 1),
    "operator.attrgetter": pickled_call("operator", "attrgetter", "system"),
    "codecs.decode": pickled_call("codecs", "decode", b"x", "zlib"),
    "lightning.pytorch.Trainer": pickled_call("lightning.pytorch", "Trainer"),
    "collections.Counter": pickled_call("collections", "Counter", "abc"),
    "STACK_GLOBAL": b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93X\x0c\0\0\0touch harmed\x85R.",
    "INST": b"(K\x01ios\nsystem\n.",
    "made of more than": nested_key(30),
}


@pytest.mark.parametrize(("name", "pickled"), PICKLES.items(), ids=PICKLES)
def test_pickles(name, pickled, tmp_path):
    write_pickle(tmp_path / FILE, pickled)
    refused(tmp_path, ["plain data", name], READERS)


@pytest.mark.parametrize("name", ["data.PKL", "DATA.pkl", "Data.Pkl"])
def test_a_pickle_under_another_name(name, tmp_path):
    write_pickle(tmp_path / FILE, PICKLES["builtins.bytearray"], name)
    refused(tmp_path, ["plain data", "builtins.bytearray"], READERS)


def test_a_pickle_without_an_archive(tmp_path):
    (tmp_path / FILE).write_bytes(pickled_call("os", "system", TOUCH))
    refused(tmp_path, ["plain data"], READERS)


# --- files ---


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(300 << 20))


def overlapping(path):
    """Many entries of the directory at the end that share one place in the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data/0", bytes(10 << 20))
        info = archive.infolist()[0]
        for i in range(1, 1000):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            twin.header_offset, twin.file_size, twin.compress_size = info.header_offset, info.file_size, info.file_size
            twin.CRC = info.CRC
            archive.filelist.append(twin)


def climbing(path):
    torch.save(good(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../harmed", "x")
        archive.getinfo("../../harmed").external_attr = 0


def truncated(path):
    torch.save(good(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path):
    torch.save(good(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = {
    "empty": (lambda path: path.touch(), "plain data"),
    "no archive": (lambda path: path.write_bytes(b"no archive" * 100), "plain data"),
    "text": (lambda path: path.write_text("{}"), "plain data"),
    "an empty archive": (lambda path: zipfile.ZipFile(path, "w").close(), "plain data"),
    "an archive of something else": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "plain data"),
    "a list": (lambda path: torch.save([1, 2], path), "layout None"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "layout None"),
    "a state dict": (lambda path: torch.save({"weight": torch.zeros(3)}, path), "layout None"),
    "a compressed bomb": (bomb, "is compressed"),
    "overlapping entries": (overlapping, "plain data"),
    "a climbing name": (climbing, "is an unsafe name"),
    "truncated": (truncated, "plain data"),
    "a flipped bit": (flipped, "checksum"),
    "a loop of links": (lambda path: path.symlink_to(path.name), "no such file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "no such file"),
    "a pipe": (os.mkfifo, "no such file"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize(("write", "words"), FILES.values(), ids=FILES)
def test_files(write, words, tmp_path):
    write(tmp_path / FILE)
    refused(tmp_path, [FILE, words], READERS)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / FILE).mkdir()
    refused(tmp_path, [FILE, "no such file"], [to_sample])
    refused(tmp_path, [FILE, "no checkpoint"], READERS[1:])


def test_run_folders(tmp_path):
    """Whatever lies where the checkpoints of a run should be."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step_0000001.ckpt").mkdir()
    os.mkfifo(folder / "step_0000002.ckpt")
    (folder / "step_0000003.ckpt").symlink_to("step_0000003.ckpt")
    (folder / "step_0000004.ckpt").touch()
    write_pickle(folder / "step_0000005.ckpt", PICKLES["os.system"])
    refused(tmp_path, ["run", "no good checkpoint"], READERS[1:], "run")
    found = isolated(lambda: load_trained(options("sample", run="run"), ()), tmp_path)
    assert found.kind == "ConfigError"
    assert "no good checkpoint" in found.message


# --- the commands themselves ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"sampler": EVIL}}, "sampler._target_=os.system"),
        ({"schema": 9}, "layout 9"),
        ({"ema": {"../x": {}}}, "its average ../x"),
    ],
    ids=["target", "layout", "name"],
)
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands(command, changes, words, tmp_path):
    torch.save(good() | changes, tmp_path / FILE)
    done = call(command, f"checkpoint={FILE}", cwd=tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert done.err.startswith("config error: ")
    assert words in done.err
    assert files_below(tmp_path) == [FILE]


@pytest.mark.parametrize(
    "kind", ["pickle", pytest.param("target", marks=pytest.mark.slow), pytest.param("nan", marks=pytest.mark.slow)]
)
def test_as_a_process_of_its_own(kind, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint, words = good(), "no good checkpoint"
    if kind == "target":
        checkpoint["config"]["sampler"], words = EVIL, "sampler._target_=os.system"
    if kind == "nan":
        checkpoint["ema"]["ema"][first(checkpoint["ema"]["ema"])].fill_(float("nan"))
        words = " is not finite"
    torch.save(checkpoint, folder / "step_0000007.ckpt")
    if kind == "pickle":
        write_pickle(folder / "step_0000007.ckpt", PICKLES["os.system"])
    before = files_below(tmp_path)
    done = run_script("sample", "run=run", cwd=tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert words in done.err
    assert files_below(tmp_path) == before


def test_the_table_is_long():
    cases = (CALLS, PLACES, SIZES, WEIGHTS, PICKLES, FILES)
    assert sum(map(len, cases)) >= 100
    assert hostile.MEMORY <= 1 << 30
