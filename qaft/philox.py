"""Random signs from a counter-based generator: the same bits on every device, for any order of calls.

    words(c, k) = Philox4x32-10 of the counter c = (block, layer low, layer high, step) under the key k

One block gives 128 signs, so that the signs of a whole model are a few thousand blocks. Integers only: no rounding, no
state, and nothing that depends on the number of processors as ``torch.randn`` on a GPU does.

Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3 (SC 2011); the test holds their vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

GENERATOR = "philox4x32-10"
"""Name of the generator, for files that depend on it."""

SIGNS_PER_BLOCK = 128

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Key = tuple[int, int]
"""Two 32-bit words."""


def hash64(*parts: object) -> int:
    """Return a 64-bit hash of the parts, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def key_of(*parts: object) -> Key:
    """Return the key of a stream of random numbers: (run seed, purpose, ...)."""
    value = hash64(*parts)
    return value & _MASK, value >> 32


def philox(counter: Tensor, key: Key) -> Tensor:
    """Return the random words of each counter, int64 [N, 4] with values in [0, 2^32).

    Args:
        counter: int64 [N, 4] of 32-bit words.
        key: see ``key_of``.
    """
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of 32-bit words wraps into the sign of int64; its bits are right, and the mask drops the copies of
        # the sign that the shift brings in.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


def signs(shapes: Mapping[str, torch.Size], *, key: Key, step: int, device: torch.device) -> dict[str, Tensor]:
    """Return independent tensors of +1 and -1 by name, fp32; each depends on (key, step, its name and shape) alone.

    Args:
        shapes: name -> shape.
        key: see ``key_of``.
        step: below 2^32.
        device: where; the values do not depend on it.
    """
    counts = {name: -(-shape.numel() // SIGNS_PER_BLOCK) for name, shape in shapes.items()}
    ids = [hash64(name) for name in shapes]
    lengths = torch.tensor(list(counts.values()), device=device)
    layers = torch.tensor([[value & _MASK, value >> 32] for value in ids], device=device)
    # All layers at once: a launch per layer would cost more than the numbers.
    layer = layers.repeat_interleave(lengths, dim=0)
    block = torch.cat([torch.arange(count, device=device) for count in counts.values()])
    counter = torch.stack([block, layer[:, 0], layer[:, 1], torch.full_like(block, step)], dim=1)
    parts = _signs(philox(counter, key)).split([count * SIGNS_PER_BLOCK for count in counts.values()])
    return {name: part[: shape.numel()].view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _signs(words: Tensor) -> Tensor:
    # Bytes first, by value and not by memory layout, so that the wide type is as small as the words are.
    shifts = torch.arange(0, 32, 8, device=words.device)
    octets = (words.unsqueeze(-1) >> shifts & 0xFF).to(torch.uint8)
    return unpack_signs(octets.flatten(), torch.float32)


def unpack_bits(octets: Tensor) -> Tensor:
    """Return the bits of uint8 [..., N], lowest first, as uint8 [..., 8 N] of zeros and ones."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (octets.unsqueeze(-1) >> shifts & 1).flatten(-2)


def unpack_signs(octets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return +1 for each bit that is set and -1 for the others, lowest first, [..., N] -> [..., 8 N]."""
    # A look-up writes each value once; shifting and scaling every bit would be five passes.
    return torch.nn.functional.embedding(octets.int(), _sign_table(dtype, octets.device)).flatten(-2)


@cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode that it is first asked for in
        values = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)
        return unpack_bits(values).to(dtype).mul_(2).sub_(1)  # [256, 8]


def pack_bits(bits: Tensor) -> Tensor:
    """Return uint8 [..., ceil(N / 8)] that ``unpack_bits`` turns back into ``bits`` [..., N] and zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
