"""Codes of 2 to 8 bits as dense int32 words, in the layout of compressed-tensors (``pack-quantized``).

    element i of a row is bits [i b, (i + 1) b) of the row's bit string, lowest bit first, and holds code + 2^(b-1)

Eight elements of b bits are exactly b bytes, so both directions work on one int64 per eight elements, in the byte order
of little-endian hosts.

``pack_nibbles`` is the layout of bitsandbytes instead: indices of a code book of 16, two to a byte.

Source: the layout of ``compressed_tensors.compressors.pack_quantized`` (0.20), on whose output the tests rely.
Shapes: O = out_features, I = in_features, G = groups along I, W = ceil(I * bits / 32).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_OCTET = 8


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be in [2, 8] to be packed")


def pack_int32(values: Tensor, bits: int) -> Tensor:
    """Return the codes ``values`` (int8 [O, I], in [-2^(bits-1), 2^(bits-1) - 1]) as int32 [O, W].

    Raises:
        ValueError: bits is not in [2, 8], or the values are not int8 [O, I].
    """
    _check_bits(bits)
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(
            f"codes are {values.dtype} {list(values.shape)}: must be torch.int8 [out_features, in_features]"
        )
    rows, columns = values.shape
    octets = F.pad(values, (0, -columns % _OCTET)).unflatten(1, (-1, _OCTET))
    word = torch.zeros(octets.shape[:2], dtype=torch.int64, device=values.device)
    for position in range(_OCTET):
        # Adding the offset in int64 keeps code + 128 of 8 bits from wrapping in int8.
        word |= (octets[..., position].long() + (1 << (bits - 1))) << (bits * position)
    num_bytes = -(-columns * bits // 8)
    row_bytes = torch.zeros(rows, -(-num_bytes // 4) * 4, dtype=torch.uint8, device=values.device)
    row_bytes[:, :num_bytes] = word.view(torch.uint8).view(rows, -1, 8)[..., :bits].flatten(1)[:, :num_bytes]
    if columns * bits % 8:
        # The padding codes 0 became offsets; compressed-tensors leaves the bits after the last code 0.
        row_bytes[:, num_bytes - 1] &= (1 << (columns * bits % 8)) - 1
    return row_bytes.view(torch.int32)


def unpack_int32(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the codes of ``packed`` (int32 [O, W]) as int8 [O, in_features]: the inverse of ``pack_int32``.

    Raises:
        ValueError: bits is not in [2, 8], or W is not ceil(in_features * bits / 32).
    """
    _check_bits(bits)
    words = -(-in_features * bits // 32)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != words:
        raise ValueError(
            f"packed codes are {packed.dtype} {list(packed.shape)}: must be torch.int32 [out_features, {words}] for "
            f"in_features={in_features} of {bits} bits"
        )
    row_bytes = packed.contiguous().view(torch.uint8)
    if bits == 8:
        # Flipping the top bit of a byte turns code + 128 into the two's complement of the code.
        return (row_bytes[:, :in_features] ^ 0x80).view(torch.int8)
    num_octets = -(-in_features // _OCTET)
    row_bytes = F.pad(row_bytes, (0, num_octets * bits - row_bytes.shape[1])).unflatten(1, (num_octets, bits))
    word = F.pad(row_bytes, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    values = torch.empty(packed.shape[0], num_octets, _OCTET, dtype=torch.int8, device=packed.device)
    for position in range(_OCTET):
        code = (word >> (bits * position)).bitwise_and_((1 << bits) - 1)
        values[..., position] = code.sub_(1 << (bits - 1))
    return values.flatten(1)[:, :in_features]


def pack_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """Return zero points (int8 [O, G]) packed along O, int32 [ceil(O * bits / 32), G], as compressed-tensors does."""
    return pack_int32(zero_point.T, bits).T.contiguous()


def unpack_zero_point(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Return int8 [out_features, G]: the inverse of ``pack_zero_point``."""
    return unpack_int32(packed.T, bits, out_features).T.contiguous()


def pack_nibbles(indices: Tensor) -> Tensor:
    """Return code book indices (int8 [O, I] in [0, 15], I even) two to a byte, the first one high, uint8 [O, I / 2]."""
    pairs = indices.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] << 4 | pairs[..., 1]
