"""What the pickle inside a checkpoint may name.

torch.load(weights_only=True) refuses to run anything else, but it does not say what it met, and it would still make room for
`bytearray(10**12)`.
"""

from __future__ import annotations

import pickletools
import re

LARGEST = 2**28  # bytes of a pickle; that of a network of 10,000 tensors, with averages and optimizer, has some MB
_DATA = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|torch Size|torch device"
    r"|torch b?float\d+|torch u?int\d+|torch complex\d+|torch bool|_codecs encode|(__builtin__|builtins) set"
)


def flaw_of_pickle(data: bytes) -> str | None:
    """What a pickle names that is no plain data, tensor or storage, in a few words; None if there is nothing.

    Raises:
        ValueError: if it is no pickle.
    """
    if len(data) > LARGEST:
        return f"its pickle has {len(data)} bytes"
    for operation, name, _ in pickletools.genops(data):
        if operation.name == "GLOBAL" and not _DATA.fullmatch(str(name)):
            return f"it names {'.'.join(str(name).split())[:80]!r}"
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            return f"it names something by {operation.name}"
    return None
