"""State dicts under other names: one table of patterns, written from our names to theirs, serves both directions.

Since our network lists its own names, each of them is turned into theirs and never the other way round. In what a table
produces, `{q,k,v}` stands for several of their tensors that are ours when joined along the first axis, and `*` for equal
copies of one tensor in every block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Table = Sequence[tuple[str, str]]
Shapes = Mapping[str, Sequence[int]]


class Origin(NamedTuple):
    """Their names of one of our tensors, of which ours is made by joining or, if not `joined`, which are all the same."""

    names: tuple[str, ...]
    joined: bool = False


def renamed(name: str, table: Table) -> str:
    """A name of ours after all substitutions (regular expression, replacement) of a table, one after the other."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def origins(names: Iterable[str], table: Table, copies: int = 1) -> dict[str, Origin]:
    """Where each of our tensors is found.

    Args:
        names: of our state dict.
        table: from our names to theirs, with the placeholders above.
        copies: blocks that `*` stands for.
    """
    found = {}
    for name in names:
        other = renamed(name, table)
        parts = re.search(r"\{(.*)\}", other)
        if parts is not None:
            found[name] = Origin(tuple(other.replace(parts[0], part) for part in parts[1].split(",")), joined=True)
        elif "*" in other:
            found[name] = Origin(tuple(other.replace("*", str(i)) for i in range(copies)))
        else:
            found[name] = Origin((other,))
    return found


def to_ours(
    theirs: Mapping[str, Tensor],
    table: Mapping[str, Origin],
    shapes: Shapes,
    constants: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Our state dict, float32, from theirs.

    Args:
        theirs: their state dict.
        table: where each of our tensors is found.
        shapes: of our tensors.
        constants: tensors of theirs, by their names, that must be as given and have no counterpart with us; they may be
            left out.

    Raises:
        ValueError: listing what is missing, unknown, of another shape, or should be equal and is not.
    """
    constants = constants or {}
    wanted = [name for origin in table.values() for name in origin.names]
    problems = _listed("missing", [name for name in wanted if name not in theirs])
    problems += _listed("unknown", sorted(theirs.keys() - set(wanted) - constants.keys()))
    if problems:
        raise ValueError(f"keys: {'; '.join(problems)}")
    ours: dict[str, Tensor] = {}
    misfits, unequal = [], [n for n, c in constants.items() if n in theirs and not _close(theirs[n], c)]
    for name, origin in table.items():
        parts = [theirs[n] for n in origin.names]
        if not origin.joined:
            unequal += [n for n, p in zip(origin.names, parts, strict=True) if not torch.equal(p, parts[0])]
        try:
            value = torch.cat(parts) if origin.joined else parts[0]
        except RuntimeError:  # the parts do not fit together
            value = parts[0]
        if tuple(value.shape) != tuple(shapes[name]):
            misfits.append(f"{origin.names[0]} {tuple(value.shape)}, not {tuple(shapes[name])}")
        ours[name] = value.to(torch.float32, copy=True)
    problems = _listed("of another shape", misfits) + _listed("that should be equal to others and are not", unequal)
    if problems:
        raise ValueError(f"keys: {'; '.join(problems)}")
    return ours


def to_theirs(ours: Mapping[str, Tensor], table: Mapping[str, Origin]) -> dict[str, Tensor]:
    """Their state dict from ours."""
    theirs: dict[str, Tensor] = {}
    for name, origin in table.items():
        count = len(origin.names)
        parts = ours[name].chunk(count) if origin.joined else [ours[name]] * count
        theirs |= {n: part.detach().clone() for n, part in zip(origin.names, parts, strict=True)}
    return theirs


def _close(tensor: Tensor, constant: Tensor) -> bool:
    return tensor.shape == constant.shape and torch.allclose(tensor.float(), constant.float(), rtol=0, atol=1e-5)


def _listed(what: str, names: Sequence[str], most: int = 5) -> list[str]:
    """How many names there are and the first few; nothing if there are none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what} ({', '.join(names[:most])}{more})"] if names else []
