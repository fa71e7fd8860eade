"""Bytes of a frozen layer from its shape alone: what ``build_base`` would store, without a weight."""

from __future__ import annotations

import torch

from qaft.bases import DENSE_STORAGES
from qaft.quant.affine import Affine
from qaft.quant.ggml import GgmlBlocks


def storage_bytes(
    storage: str,
    out_features: int,
    in_features: int,
    *,
    quantizer: Affine | GgmlBlocks | None = None,
    double_quant: bool = False,
) -> int:
    """Return the bytes of codes and scales of an [O, I] weight, without its bias.

    Args:
        storage: one of ``STORAGES``.
        out_features: O.
        in_features: I.
        quantizer: the grid of ``int4`` and ``int8_group``.
        double_quant: nf4 and fp4 only: 8-bit block scales.

    Raises:
        ValueError: the storage is unknown, or its grid is missing.
    """
    size = out_features * in_features
    if storage in DENSE_STORAGES:
        return size * DENSE_STORAGES[storage].itemsize
    if storage in ("int4", "int8_group"):
        if quantizer is None:
            raise ValueError(f"storage {storage!r} needs a quantizer, the grid of its codes")
        return _affine_bytes(out_features, in_features, quantizer)
    if storage == "int8":
        return size + out_features * torch.float32.itemsize
    if storage in ("nf4", "fp4"):
        return -(-size // 2) + _block_scale_bytes(size, double_quant)
    raise ValueError(f"storage {storage!r} is not known")


def _affine_bytes(out_features: int, in_features: int, quantizer: Affine | GgmlBlocks) -> int:
    groups = 1 if quantizer.group_size is None else in_features // quantizer.group_size
    words = out_features * -(-in_features * quantizer.bits // 32)
    if not quantizer.symmetric:
        words += -(-out_features * quantizer.bits // 32) * groups
    return words * torch.int32.itemsize + out_features * groups * quantizer.scale_dtype.itemsize


def _block_scale_bytes(size: int, double_quant: bool) -> int:
    # bitsandbytes loads its native library on import.
    from qaft.bases.bnb import BLOCK_SIZE, NESTED_BLOCK_SIZE

    blocks = -(-size // BLOCK_SIZE)
    if not double_quant:
        return blocks * torch.float32.itemsize
    code_book, offset = 256, 1
    return blocks + (code_book + offset + -(-blocks // NESTED_BLOCK_SIZE)) * torch.float32.itemsize
