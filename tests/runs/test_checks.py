from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import pytest
import torch

from denoiselab.runs.checks import check_kind, check_types, check_value, locate, show
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


# --- what nodes are built into ---


class Deeper(Inner):
    pass


class Other:
    pass


class Answers:
    def answer(self, x: int) -> int:
        return x


class Oracle(Protocol):
    size: int

    def answer(self, x: int) -> int: ...


def make_inner() -> Inner:
    return Inner()


def make_anything():
    return Inner()


def node(thing, late=False):
    return {"_target_": f"{HERE}.{thing.__name__}"} | ({"_partial_": True} if late else {})


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (node(Inner), Inner),
        (node(Deeper), Inner),
        (node(Deeper), Inner | None),
        (node(make_inner), Inner),
        (node(make_anything), Inner),  # it does not say
        (node(Other), Any),
        (node(Answers), Oracle),
        (node(Inner, late=True), Callable[..., Inner]),
        (node(make_inner, late=True), Callable[..., Inner]),
        (
            node(torch.nn.Identity) | {"_target_": "torch.nn.Identity"},
            Callable[..., Inner],
        ),  # a built one can be called
        ([node(Inner), node(Deeper)], list[Inner]),
        ({"a": node(Inner), "b": None}, dict[str, Inner | None]),
    ],
)
def test_nodes_of_the_kind_that_is_wanted(value, wanted):
    check_kind(value, wanted, "a.b")


@pytest.mark.parametrize(
    ("value", "wanted", "line"),
    [
        (node(Other), Inner, f"a.b._target_={HERE}.Other: must be a Inner"),
        (node(Inner), Deeper, "must be a Deeper"),
        (node(Inner), Deeper | Other | None, "must be a Deeper or a Other"),
        (node(make_inner), Deeper, "must be a Deeper"),
        (node(Other), float, "must be a number"),
        (node(Other), str | None, "must be text"),
        (node(Other), Oracle, "must be a Oracle"),
        (node(Inner, late=True), Inner, "must be a Inner"),
        (node(Other, late=True), Callable[..., Inner], "something that makes a Inner, with _partial_: true"),
        (node(Inner), Callable[..., Inner], "something that makes a Inner, with _partial_: true"),
        ([node(Inner), node(Other)], list[Inner], rf"a.b\[1\]._target_={HERE}.Other: must be a Inner"),
        ({"x": node(Other)}, dict[str, Inner | None], f"a.b.x._target_={HERE}.Other: must be a Inner"),
        ({"x": node(Inner), "y": 3}, dict[str, Inner], "a.b.y=3: must be"),
    ],
)
def test_nodes_of_another_kind(value, wanted, line):
    with pytest.raises(ConfigError, match=line):
        check_kind(value, wanted, "a.b")
    with pytest.raises(ConfigError, match="group.inner._target_=.*must be a Inner"):
        check_types({"group": GOOD | {"inner": node(Other)}})


def test_whether_it_is_built_late_is_true_or_false():
    with pytest.raises(ConfigError, match="group._partial_=yes: must be true or false"):
        check_types({"group": INNER | {"_partial_": "yes"}})


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_"])
def test_hydras_other_words_are_no_keys(key):
    with pytest.raises(ConfigError, match=f"group.{key}=.*no such key"):
        check_types({"group": GOOD | {key: [1]}})


@pytest.mark.parametrize("target", ["builtins.dict", ".x", "..x.y", "os.", "x y.z", "a..b"])
def test_odd_targets_end_in_one_line(target):
    with pytest.raises(ConfigError, match="group._target_=") as caught:
        check_types({"group": {"_target_": target, "a": 1}})
    assert "\n" not in str(caught.value)


def test_values_are_shown_in_one_line_and_not_at_any_length():
    assert show("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert len(show("x" * 10**6)) < 200
    assert (show(None), show(True), show(["a"])) == ("null", "true", "['a']")
    for value in ({"a": [1, "b", None], 2: {}}, (1,), (), [(), [True, 0.5]], "x" * 160):
        assert show(value) == str(value)


def test_what_is_nested_or_large_is_shown_by_its_beginning():
    unfolding = ["x" * 10**6] * 10
    for _ in range(30):
        unfolding = [unfolding] * 10
    circle = {}
    circle["again"] = circle
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (unfolding, circle, deep, {(1, 2): unfolding}):
        assert len(show(value)) < 200
        assert show(value).endswith("...")
    assert show(10**5000) == "a number of 16610 bits"
