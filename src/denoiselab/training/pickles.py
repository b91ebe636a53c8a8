"""What the pickle inside a checkpoint may name, and how much it may make of little.

torch.load(weights_only=True) refuses to run anything else, but it does not say what it met, it would still make room for
`bytearray(10**12)`, and a tuple of tuples of tuples, each ten times the one below, is hashed for years as the key of a dict.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping
from typing import Any

LARGEST = 2**28  # bytes of a pickle; that of a network of 10,000 tensors, with averages and optimizer, has some MB
MOST = 10**7  # parts in all, shared ones each time; that network's has a million
MOST_OF_A_TUPLE = 1000  # or of what is made of one: a tensor is made of some 20
_BYTES = {
    "Byte": 1,
    "Char": 1,
    "Bool": 1,
    "Short": 2,
    "Half": 2,
    "BFloat16": 2,
    "Int": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
_DATA = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch Size|torch device"
    r"|torch b?float\d+|torch u?int\d+|torch complex\d+|torch bool|_codecs encode|(__builtin__|builtins) set"
    rf"|torch ({'|'.join(_BYTES)})Storage"
)
# The operations that torch's own reader knows: how many parts each takes from the stack to make a new one (None: all down
# to the mark), or to put them into the one below.
_MAKES: dict[str, int | None] = {
    **dict.fromkeys(
        ("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "GLOBAL"), 0
    ),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), 0),
    "TUPLE": None,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BINPERSID": 1,
}
_FILLS: dict[str, int | None] = {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "BUILD": 1}


class _Part:
    """What an operation has made: its size with all that is in it, the parts that it was made of, a constant's value."""

    __slots__ = ("made_of", "value", "weight")

    def __init__(self, weight: int, made_of: list[_Part], value: Any) -> None:
        self.weight, self.made_of, self.value = weight, made_of, value


def flaw_of_pickle(data: bytes, records: Mapping[str, int]) -> str | None:
    """What is wrong with a pickle: what it names that is no plain data, what unfolds without end, a storage that is not there.

    Args:
        data: the pickle.
        records: the bytes of each record of the archive, by its name in small letters ("data/0").

    Returns:
        The flaw in a few words; None if there is none.

    Raises:
        ValueError: if it is no pickle.
        LookupError: if it is none that could be read.
    """
    if len(data) > LARGEST:
        return f"its pickle has {len(data)} bytes"
    stack: list[_Part | None] = []  # None is a mark
    memo: dict[Any, _Part | None] = {}
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name == "GLOBAL" and not _DATA.fullmatch(str(argument)):
            return f"it names {'.'.join(str(argument).split())[:80]!r}"
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name in _MAKES:
            taken = _taken(stack, _MAKES[name])
            if name in ("REDUCE", "NEWOBJ"):  # what a list among the arguments weighs by now
                taken = [taken[0], *taken[1].made_of]
            weight = 1 + sum(part.weight for part in taken)
            if weight > MOST_OF_A_TUPLE:
                return f"something in it is made of more than {MOST_OF_A_TUPLE} parts"
            flaw = _flaw_of_storage([part.value for part in taken[0].made_of], records) if name == "BINPERSID" else None
            if flaw:
                return flaw
            stack.append(_Part(weight, taken, argument))
        elif name in _FILLS:
            taken, filled = _taken(stack, _FILLS[name]), stack[-1]
            if filled is None:
                return "it fills nothing"
            filled.weight += sum(part.weight for part in taken)
            if filled.weight > MOST:
                return f"it unfolds to more than {MOST:,} parts"
        elif name not in ("PROTO", "STOP"):
            return f"it uses {name}"
    return None


def _taken(stack: list[_Part | None], count: int | None) -> list[_Part]:
    """So many parts from the top of a stack, or all down to the mark, which goes with them."""
    taken: list[_Part] = []
    while count is None or len(taken) < count:
        part = stack.pop()
        if part is None:
            if count is not None:
                raise LookupError("a mark in place of a part")
            break
        taken.append(part)
    return taken[::-1]


def _flaw_of_storage(named: list[Any], records: Mapping[str, int]) -> str | None:
    """What is wrong with what stands for the bytes of a tensor: ("storage", type, key, location, number of elements)."""
    if len(named) != 5 or type(named[2]) is not str or type(named[4]) is not int:
        return "it names a storage in another way than torch"
    given, kind = (
        records.get(f"data/{named[2]}".lower(), 0),
        str(named[1]).removeprefix("torch ").removesuffix("Storage"),
    )
    needed = named[4] * _BYTES.get(kind, 1)
    return None if given == needed else f"a tensor's numbers are {given} bytes in it, not {needed}"
