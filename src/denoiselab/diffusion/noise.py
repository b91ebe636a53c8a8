"""Noise with an owner: random numbers that are a pure function of (seed, purpose, step, index).

A generator that is advanced (torch's, numpy's) makes a draw depend on every draw before it, so on batch size, rank count
and resume history. A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no
state: it is a keyed bijection of a counter. Here the key is a hash of (seed, purpose) and the counter is
(block, index, step): sample `index` at `step` gets the same numbers whichever rank, batch or device asks for them.

Philox4x32-10 is written in int64 tensor arithmetic, so that one vectorised pass serves the whole batch on any device.
Normals are Box-Muller pairs in float64, rounded once to the wanted type: 32-bit words reach out to 6.7 standard deviations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 of four broadcastable int64 tensors that hold 32-bit words, as four int64 tensors of 32-bit words.

    Source: Salmon et al. 2011, section 5.3; the known-answer vectors of Random123 are in the tests.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product wraps in int64, but its bit pattern is right: masking after the shift reads the high word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def hash64(*parts: int | str) -> int:
    """64 bits that depend on all the parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


@cache
def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The two 32-bit words that key the draws of a purpose."""
    bits = hash64(seed, purpose)
    return bits & _MASK, bits >> 32


def bits16(count: int, index: Tensor, step: Tensor, key: tuple[int, int]) -> Tensor:
    """Uniform 16-bit numbers from −32768 to 32767, eight of each counter: for draws that need many and no finer ones.

    Args:
        count: numbers per sample.
        index: (B,) int64, which samples; as in `NoiseSource`.
        step: int64 of shape (): a tensor, so that what calls this can be compiled once for all steps.
        key: of `key_of`.

    Returns:
        An int16 tensor of shape (B, count).
    """
    block = torch.arange(-(-count // 8), device=index.device)[None, :]
    words = philox4x32((block, index[:, None], step & _MASK, step >> 32), key)
    return torch.cat([word.to(torch.int32) for word in words], dim=1).view(torch.int16)[:, :count]


@dataclass(frozen=True)
class NoiseSource:
    """Random numbers for one batch of samples.

    Args:
        seed: any integer.
        index: (B,) int64 on the device where the numbers are wanted: which samples these are. In training the place in the
            *global* batch, in sampling the number of the sample. 0 ≤ index < 2³².
        step: training step, or step of the sampler; 0 ≤ step < 2⁶⁴.
        total: samples in the global batch, for draws that are spread over it (stratified times). None: B.
    """

    seed: int
    index: Tensor
    step: int = 0
    total: int | None = None

    def at(self, step: int) -> NoiseSource:
        """The same samples at another step."""
        return replace(self, step=step)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Float[Tensor, B * shape]:  # noqa: F821
        """Uniform on the open interval (0, 1), float64, of shape (B, *shape)."""
        n = math.prod(shape)
        block = torch.arange(-(-n // 4), device=self.index.device)[None, :]
        step = torch.full_like(block[:, :1], self.step & _MASK)
        words = philox4x32(
            (block, self.index[:, None], step, torch.full_like(step, self.step >> 32)),
            key_of(self.seed, purpose),
        )
        flat = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :n]
        return flat.double().add_(0.5).mul_(2.0**-32).reshape(len(self.index), *shape)

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, B * shape]:  # noqa: F821
        """Standard normal of shape (B, *shape)."""
        n = math.prod(shape)
        u = self.uniform(purpose, (-(-n // 2), 2))
        radius, angle = torch.sqrt(-2 * torch.log(u[..., 0])), 2 * math.pi * u[..., 1]
        z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return z.flatten(1)[:, :n].to(dtype).reshape(len(self.index), *shape)
