"""Whatever is typed: a config is fine, or one line says what is wrong with it; no traceback, and nothing is created."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from calls import CONF, call, composed, files_below
from hostile import FILE, good, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import denoiselab.app.evaluate
import denoiselab.app.sample
import denoiselab.app.train
from denoiselab.app.build import make_training
from denoiselab.app.resume import find_start

QUIET = ["metrics=none", "logger=none"]
MEASURED = ["metrics=digits", "metrics.counts=[20]"]
FEW, MANY = 20, 100
# --- what may be typed ---

# Words that are wrong nearly everywhere, right somewhere, or special to Hydra, OmegaConf, YAML, a shell or a terminal.
WORDS = [
    "null",
    "none",
    "true",
    "false",
    "yes",
    "auto",
    "ema",
    "raw",
    "cpu",
    "gpu",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "64",
    "100000",
    "1e-9",
    "1e3",
    "1e400",
    "-1e400",
    "0.5",
    "1.5",
    "-0.5",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "1000000000000",
    "1_000",
    "0x10",
    "1e",
    "1.2.3",
    ".5",
    "5.",
    "08",
    "[]",
    "[1]",
    "[1,2]",
    "[0]",
    "[-1]",
    "[0.5,0.5]",
    "[1,a]",
    "[null]",
    "[[]]",
    "[[1]]",
    "[nan]",
    "[1000000000000]",
    "[1,",
    "[1",
    "1]",
    "[]",
    "{}",
    "{a:1}",
    "{a:{b:1}}",
    "{a:null}",
    "{1:2}",
    "{a",
    "{_target_:os.getcwd}",
    "{_target_:torch.nn.Identity}",
    "{_target_:torch.nn.Identity,_partial_:true}",
    "[{_target_:os.getcwd}]",
    "{_target_:3}",
    "{a:{_target_:torch.nn.Identity}}",
    "{_partial_:true}",
    "{_target_:torch.optim.Adam,_partial_:1}",
    "{_args_:[1]}",
    "{_target_:}",
    "os.getcwd",
    "builtins.dict",
    "builtins.print",
    "torch.nn.Identity",
    "torch.optim.Adam",
    "denoiselab.training.ema.EMA",
    "a.b.c",
    ".",
    "..",
    "a.",
    ".a",
    "a..b",
    "os.",
    "denoiselab.diffusion.paths.RectifiedFlow",
    "denoiselab.diffusion.guidance.unguided",
    "denoiselab.training.logs.no_logger",
    "'",
    '"',
    "''",
    '""',
    "'a",
    '"a',
    "'a'",
    '"a"',
    "\\",
    "\\'",
    "\\n",
    ",",
    "=",
    ":",
    ";",
    "#",
    "@",
    "$",
    "$$",
    "$x",
    "${",
    "${}",
    "}",
    "${x}",
    "${seed}",
    "${.x}",
    "${..seed}",
    "${oc.env:NOTHING}",
    "${oc.env:HOME}",
    "${oc.decode:1}",
    "${datamodule}",
    "${optimizer}",
    "${oc.create:{a:1}}",
    "\\${seed}",
    "???",
    "?",
    "*",
    "**",
    "../x",
    "/dev/null",
    ".",
    "/",
    "~",
    "a/b",
    "é",
    "名前",
    "🙂",
    "%s",
    "{0}",
    "<x>",
    "&",
    "|",
    "`",
    "!",
    "choice(1,2)",
    "range(1,3)",
    "glob(*)",
    "sort(3,2)",
    "int(3)",
    "str(3)",
    "float(x)",
    "bool(3)",
    "interval(0,1)",
    "extend_list(1)",
    "a,b",
    "1,2",
    "[1,2],[3]",
]
LONG = [
    "x" * 300,
    "x" * 1000,
    "/tmp/" + "x/" * 2500,
    "1" * 5000,
    "[" * 300 + "]" * 300,
    "[" + "1," * 500 + "1]",
    "{a:" * 50 + "1" + "}" * 50,
    "${" * 50,
    "a\nb",
    "a\tb",
    " ",
]
values = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(WORDS),
    st.sampled_from(LONG),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(width=64).map(str),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=8),
)


plain_values = st.one_of(
    st.sampled_from([word for word in WORDS if re.fullmatch(r"[\w.+-]+|\[[\w.,\[\]-]*\]|\{[\w.,:]*\}", word)]),
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-10, 100).map(str),
    st.floats(width=64).map(str),
    st.lists(st.integers(-2, 20), max_size=4).map(lambda v: str(v).replace(" ", "")),
)


numbers = st.one_of(
    st.sampled_from(
        [
            "0",
            "-1",
            "1",
            "2",
            "3",
            "nan",
            "inf",
            "-inf",
            "1e-300",
            "1e300",
            "-0.0",
            "1e-9",
            "0.5",
            "100000",
            "1000000000000",
            "[]",
            "[0]",
            "[1,1]",
            "[nan]",
            "[-1]",
            "null",
            "true",
        ]
    ),
    st.integers(-10, 1000).map(str),
    st.floats(width=64).map(str),
    st.floats(-1, 2).map(str),
)


def keys_of(node, path=""):
    """The dotted names of a config's values and nodes."""
    found = [path] if path else []
    for key, value in node.items() if isinstance(node, dict) else ():
        found += keys_of(value, f"{path}.{key}" if path else key)
    return found


def choices():
    """Each choice of each group, as typed."""
    files = [path.relative_to(CONF).with_suffix("") for path in sorted(CONF.rglob("*.yaml"))]
    return [f"{file.parent.as_posix()}={file.name}" for file in files if file.parent.name]


def numbers_of_choices():
    """Each choice of each group of a run with the keys of its own numbers, as typed."""
    found = []
    for choice in CHOICES:
        group, _, name = choice.partition("=")
        if group.partition("/")[0] in RUN_GROUPS:
            node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) or {}
            own = {key: value for key, value in node.items() if isinstance(value, int | float | list | None)}
            found += [(choice, f"{group.replace('/', '.')}.{key}") for key in own if key != "defaults"]
    return found


CHOICES = choices()
RUN_GROUPS = [
    "datamodule",
    "backbone",
    "objective",
    "sampler",
    "guidance",
    "optimizer",
    "schedule",
    "ema",
    "metrics",
    "codec",
    "augmentation",
    "trainer",
]
NUMBERS = numbers_of_choices()
GROUPS = sorted({choice.partition("=")[0] for choice in CHOICES})
prefixes = st.sampled_from(["", "", "", "", "+", "++", "~"])
ODD_KEYS = [
    "x",
    "x.y",
    "",
    ".",
    "seed.x",
    "optimizer.",
    "_target_",
    "optimizer._partial_",
    "optimizer._args_",
    "a b",
    "é",
    "hydra.x",
]
ODD_KEYS += [
    "callbacks.x",
    "guidance.parts",
    "guidance.parts.x",
    "guidance.parts.a/b",
    "ema.decays.../x",
    "ema.decays.x",
    "0",
    "a[0]",
]
ODD_KEYS += [
    "optimizer.betas.0",
    "objective.path._target_",
    "metrics.extractors.x",
    "metrics.measures.x",
    "trust",
    "allow",
    "seed",
]


@st.composite
def overrides(draw, keys):
    """One override of a command whose config has these keys: most often an odd value of a key."""
    kind, key = draw(st.integers(0, 19)), draw(st.sampled_from(keys))
    if kind <= 10:
        return f"{key}={draw(plain_values)}"
    if kind <= 13:
        return draw(st.sampled_from(CHOICES))
    if kind == 14:
        return f"{draw(prefixes)}{key}={draw(values)}"
    if kind == 15:
        return f"{draw(prefixes)}{draw(st.sampled_from(ODD_KEYS))}={draw(plain_values)}"
    if kind == 16:
        return f"{draw(st.sampled_from(GROUPS))}={draw(values)}"
    if kind == 17:
        group, _, choice = draw(st.sampled_from(CHOICES)).partition("=")
        return f"{draw(prefixes)}{group}@{key}={choice}"
    if kind == 18:
        return f"~{key}"
    return draw(values.filter(lambda text: not text.startswith("-")))  # flags are for argparse


@st.composite
def odd_numbers(draw):
    """A choice of a group with an odd value for one of its own keys."""
    choice, key = draw(st.sampled_from(NUMBERS))
    return [choice, f"{key}={draw(numbers)}"]


TRAIN_KEYS = keys_of(composed("guidance=cfg_rescale", "objective/weighting=min_snr"))
SAMPLE_KEYS, EVALUATE_KEYS = keys_of(options("sample")), keys_of(options("evaluate"))
OTHERS = ("replay", "compare", "convert", "frontier", "report", "sweep", "sync", "dashboard")


def lists_of(keys):
    return st.lists(overrides(keys), min_size=1, max_size=2)


@st.composite
def other_commands(draw):
    """A command that looks at runs, where there are none, and what is typed after it."""
    command = draw(st.sampled_from(OTHERS))
    return command, draw(lists_of(keys_of(options(command))))


# --- what must come of it ---

quick = settings(
    max_examples=FEW, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
long = settings(quick, max_examples=MANY)


class Checked(BaseException):
    """All checks are done, and work would begin."""


def check_one_line(command, typed, folder):
    """The command ends well, or in one line; hypothesis reports what was typed."""
    before = files_below(folder)
    try:
        done = call(command, *typed, cwd=folder)
    except Checked:
        assert files_below(folder) == before
        return
    assert files_below(folder) == before
    if done.code == 0:
        assert done.err == "" or done.err.startswith("warning: "), done.err
        return
    assert done.code == 2
    assert done.err.startswith("config error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert len(done.err) < 1200, "a line that nobody reads"
    assert "cannot be built" not in done.err, done.err  # the last resort, which names no key


@pytest.fixture(scope="module", autouse=True)
def _only_checks():
    """The commands compose and check; nothing is trained, drawn or measured."""
    patch = pytest.MonkeyPatch()

    def train(config, choices, overrides):
        make_training(config)
        find_start(config)

    def stop(*_, **__):
        raise Checked

    patch.setattr(denoiselab.app.train, "train", train)
    patch.setattr(denoiselab.app.sample, "prepare_folder", stop)
    patch.setattr(denoiselab.app.evaluate, "prepare_folder", stop)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    torch.save(good(), folder / FILE)
    return folder


@quick
@given(lists_of(TRAIN_KEYS))
def test_train(folder, typed):
    check_one_line("train", [*QUIET, *typed], folder)


@quick
@given(odd_numbers())
def test_numbers_of_a_choice(folder, typed):
    check_one_line("train", [*QUIET, *typed], folder)


@quick
@given(lists_of(SAMPLE_KEYS))
def test_sample(folder, typed):
    check_one_line("sample", [f"checkpoint={FILE}", *typed], folder)


@quick
@given(lists_of(EVALUATE_KEYS))
def test_evaluate(folder, typed):
    check_one_line("evaluate", [f"checkpoint={FILE}", *MEASURED, *typed], folder)


@quick
@given(other_commands())
def test_commands_that_look_at_runs(folder, typed):
    check_one_line(typed[0], typed[1], folder)


@pytest.mark.slow
@long
@given(other_commands())
def test_commands_that_look_at_runs_at_length(folder, typed):
    check_one_line(typed[0], typed[1], folder)


@pytest.mark.slow
@long
@given(lists_of(TRAIN_KEYS))
def test_train_at_length(folder, typed):
    check_one_line("train", [*QUIET, *typed], folder)


@pytest.mark.slow
@long
@given(odd_numbers())
def test_numbers_of_a_choice_at_length(folder, typed):
    check_one_line("train", [*QUIET, *typed], folder)


@pytest.mark.slow
@long
@given(lists_of(SAMPLE_KEYS))
def test_sample_at_length(folder, typed):
    check_one_line("sample", [f"checkpoint={FILE}", *typed], folder)


@pytest.mark.slow
@long
@given(lists_of(EVALUATE_KEYS))
def test_evaluate_at_length(folder, typed):
    check_one_line("evaluate", [f"checkpoint={FILE}", *MEASURED, *typed], folder)
