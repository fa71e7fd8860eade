"""A packed layer with other row scales and the same codes: what a scaling of its outputs is folded into.

    diag(f) (scale * code)  =  (f scale) * code          one rounding of each scale to the dtype in which it is stored

Shapes: O = out_features, I = in_features, G = groups along I.
"""

from __future__ import annotations

import copy

from torch import Tensor

from qaft.bases.affine import AffineBase
from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase


def row_scaled(base: FrozenLinear, factor: Tensor, *, name: str) -> FrozenLinear:
    """Return the layer with row o of its weight times ``factor[o]``; codes and bias are shared with ``base``.

    Args:
        base: a frozen layer.
        factor: fp32 [O].
        name: the layer, for messages.

    Raises:
        ValueError: a block of weights with one scale lies in two rows, or the scales are quantized themselves.
    """
    scaled = copy.copy(base)
    # The copy shares its dictionary of buffers with the original.
    scaled._buffers = dict(base._buffers)
    part = scales_of_rows(base, name)
    stored = getattr(base, part)
    rows = stored.float().view(len(factor), -1) * factor.unsqueeze(1)
    setattr(scaled, part, rows.view(stored.shape).to(stored.dtype))
    return scaled


def scales_of_rows(base: FrozenLinear, name: str) -> str:
    """Return the name of the buffer whose rows are factors of the rows of the weight.

    Raises:
        ValueError: see ``row_scaled``.
    """
    if isinstance(base, DenseBase):
        return "weight"
    if isinstance(base, AffineBase):
        return "weight_scale"
    from qaft.bases.bnb import FourBitBase

    if isinstance(base, FourBitBase):
        if base.nested_absmax is not None:
            raise ValueError(f"{name}: its block scales are quantized (double_quant), so rows cannot be scaled alone")
        if base.in_features % base.block_size:
            raise ValueError(
                f"{name}: blocks of {base.block_size} weights cross its rows of {base.in_features}, so one scale "
                "belongs to two rows"
            )
    return "absmax"
