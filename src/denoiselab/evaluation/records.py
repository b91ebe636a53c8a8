"""A measured number and the protocol that it was measured by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


def count_name(count: int) -> str:
    """A sample count as it stands in a metric's name: 500, 1500, 2k, 50k."""
    return str(count) if count % 1000 else f"{count // 1000}k"


@dataclass(frozen=True)
class Number:
    """One measurement.

    Args:
        name: with the sample count where the value depends on it.
        value: what was measured.
        floor: the same quantity of the real test split; None where that cannot be had at this count.
        protocol: how it was measured, plain values only. Numbers of unlike protocols are not compared.
    """

    name: str
    value: float
    floor: float | None
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The number as a plain dict, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Number:
        """The number of a dict that `to_dict` made.

        Raises:
            ValueError: if the dict has other keys.
        """
        expected = [field.name for field in fields(cls)]
        if sorted(values) != sorted(expected):
            raise ValueError(f"number={sorted(values)}: must have the keys {', '.join(expected)}")
        return cls(**values)


def sampling_protocol(config: dict[str, Any], *, weights: str, seed: int, nfe: int | None) -> dict[str, Any]:
    """How samples are made, for the record beside a number.

    Args:
        config: with the nodes `sampler` and `guidance` that were used.
        weights: "raw" or the name of an average.
        seed: of the noise.
        nfe: network evaluations per sample; None if the solver chooses them.
    """
    return {key: config[key] for key in ("sampler", "guidance")} | {
        "nfe": nfe,
        "weights": weights,
        "seed": seed,
    }
