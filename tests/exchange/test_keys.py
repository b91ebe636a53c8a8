from __future__ import annotations

import re

import pytest
import torch

from denoiselab.exchange.keys import Origin, origins, to_ours, to_theirs

TABLE = [(r"^a\.", "block.*.x."), (r"^b\.", "y.{q,k}."), (r"^c$", "z")]
names = origins(["a.w", "b.w", "c"], TABLE, copies=2)
OURS = {"a.w": torch.randn(2), "b.w": torch.randn(4, 3), "c": torch.randn(())}
SHAPES = {name: tensor.shape for name, tensor in OURS.items()}


def test_one_table_serves_both_directions():
    assert names == {
        "a.w": Origin(("block.0.x.w", "block.1.x.w")),
        "b.w": Origin(("y.q.w", "y.k.w"), joined=True),
        "c": Origin(("z",)),
    }
    theirs = to_theirs(OURS, names)
    assert set(theirs) == {"block.0.x.w", "block.1.x.w", "y.q.w", "y.k.w", "z"}
    torch.testing.assert_close(torch.cat([theirs["y.q.w"], theirs["y.k.w"]]), OURS["b.w"], rtol=0, atol=0)
    again = to_ours(theirs, names, SHAPES)
    assert again.keys() == OURS.keys()
    assert all(torch.equal(again[name], OURS[name]) for name in OURS)


def test_half_precision_becomes_float32():
    halves = {name: tensor.half() for name, tensor in to_theirs(OURS, names).items()}
    assert {tensor.dtype for tensor in to_ours(halves, names, SHAPES).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": None}, "keys: 1 missing (z)"),
        ({"extra": torch.ones(1)}, "keys: 1 unknown (extra)"),
        (
            {"z": None, "y.q.w": None, "extra": torch.ones(1)},
            "keys: 2 missing (y.q.w, z); 1 unknown (extra)",
        ),
        (
            {f"extra.{i}": torch.ones(1) for i in range(8)},
            "keys: 8 unknown (extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more)",
        ),
        ({"z": torch.ones(2)}, "keys: 1 of another shape (z (2,), not ())"),
        ({"y.k.w": torch.ones(1, 3)}, "keys: 1 of another shape (y.q.w (3, 3), not (4, 3))"),
        ({"y.k.w": torch.ones(7)}, "keys: 1 of another shape (y.q.w (2, 3), not (4, 3))"),
        (
            {"block.1.x.w": torch.zeros(2)},
            "keys: 1 that should be equal to others and are not (block.1.x.w)",
        ),
        ({"table": torch.ones(3)}, "keys: 1 that should be equal to others and are not (table)"),
    ],
)
def test_what_does_not_fit_is_listed(change, message):
    theirs = to_theirs(OURS, names) | change
    theirs = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_ours(theirs, names, SHAPES, constants={"table": torch.zeros(3)})


def test_constants_may_be_there_or_not():
    theirs = to_theirs(OURS, names)
    for more in ({}, {"table": torch.zeros(3)}):
        assert to_ours(theirs | more, names, SHAPES, constants={"table": torch.zeros(3)}).keys() == OURS.keys()
