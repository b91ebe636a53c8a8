"""A measured number and the protocol that it was measured by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from denoiselab.runs.checks import show

# What says which model was measured, and when: numbers of unlike values here are what one wants to compare
LONGEST_NAME = 200
RUN_FIELDS = ("step", "weights_sha256", "images", "images_sha256", "nfe_spent", "reference_file")


def count_name(count: int) -> str:
    """A sample count as it stands in a metric's name: 500, 1500, 2k, 50k."""
    return str(count) if count % 1000 else f"{count // 1000}k"


def base_name(plain: str, label: str, distance: str | None = None) -> str:
    """A metric's name without its count; the plain one belongs to the published Inception weights alone.

    Args:
        plain: "fid", "precision", …
        label: of the extractor, "" for the published Inception.
        distance: what stands for `plain` in other features, "fd" for "fid"; None: `plain` itself.
    """
    return f"{distance or plain}_{label}" if label else plain


@dataclass(frozen=True)
class Number:
    """One measurement.

    Args:
        name: with the sample count where the value depends on it.
        value: what was measured.
        floor: the same quantity of the real test split; None where that cannot be had at this count.
        protocol: how it was measured, plain values only. Numbers of unlike protocols are not compared.
        interval: of 95 %; None where there is none.
        jackknife: the value with block b of the samples left out, for each b; the blocks depend on the samples' numbers
            and labels alone, so that two sets drawn from one seed are paired block by block. None where there is none.
    """

    name: str
    value: float
    floor: float | None
    protocol: dict[str, Any]
    interval: tuple[float, float] | None = None
    jackknife: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The number as a plain dict, fit for JSON, with the id of its protocol."""
        return asdict(self) | {"protocol_id": protocol_id(self.protocol)}

    @classmethod
    def from_dict(cls, values: Any) -> Number:
        """The number of a dict that `to_dict` made, here or in an earlier version, which had no intervals.

        Raises:
            ValueError: if it is none, has other keys, or values of other kinds.
        """
        if not isinstance(values, dict):
            raise ValueError("number: must be a mapping")
        expected = [field.name for field in fields(cls)]
        given: dict[str, Any] = {"interval": None, "jackknife": None} | values
        given.pop("protocol_id", None)
        if sorted(given) != sorted(expected):
            raise ValueError(f"number={show(sorted(values))}: must have the keys {', '.join(expected)}")
        for key, fits in _KINDS.items():
            if not fits(given[key]):
                raise ValueError(f"number.{key}={show(given[key])}: is not what a measurement has there")
        return cls(**given | {"interval": given["interval"] and tuple(given["interval"])})


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 53)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


def _is_protocol(value: Any) -> bool:
    kinds = {"step": int, "count": int, "seed": int, "weights": str}
    return isinstance(value, dict) and all(type(value.get(key)) in (kind, type(None)) for key, kind in kinds.items())


_KINDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda v: isinstance(v, str) and v.isprintable() and 0 < len(v) <= LONGEST_NAME,
    "value": _is_number,
    "floor": lambda v: v is None or _is_number(v),
    "protocol": _is_protocol,
    "interval": lambda v: v is None or (_are_numbers(v) and len(v) == 2),
    "jackknife": lambda v: v is None or _are_numbers(v),
}


def protocol_id(protocol: dict[str, Any]) -> str:
    """Eight hex digits over a protocol without the fields that say which model was measured.

    Numbers with one name and one id may stand in one column.
    """
    compared = {key: value for key, value in protocol.items() if key not in RUN_FIELDS}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:8]


def sampling_protocol(
    config: dict[str, Any], *, weights: str, weights_sha256: str, step: int, seed: int, nfe: float | None
) -> dict[str, Any]:
    """How samples are made, for the record beside a number.

    Args:
        config: with the nodes `sampler` and `guidance` that were used.
        weights: "raw" or the name of an average.
        weights_sha256: hash of these weights.
        step: of training, that they are from.
        seed: of the noise.
        nfe: network evaluations per sample; None if the solver chooses them.
    """
    sampler = dict(config["sampler"])
    if nfe is not None and "nfe" in sampler:
        sampler |= {"nfe": nfe, "steps": None}  # however it was asked for
    return {
        "sampler": sampler,
        "guidance": config["guidance"],
        "nfe": nfe,
        "weights": weights,
        "weights_sha256": weights_sha256,
        "step": step,
        "seed": seed,
    }
