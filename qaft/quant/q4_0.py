"""Q4_0 of GGUF: blocks of 32 inputs, 16 levels from -8 to 7, and an fp16 scale with the sign of the largest weight.

    d = m / -8,  m the weight of largest magnitude (the first of them)
    q = min(15, trunc(w (1 / d) + 8.5)) - 8,  w^ = fp16(d) q

The largest weight is level -8, exact up to the rounding of d; its opposite would be level 8, which is clipped to 7.
Codes are computed with d in fp32, before it is rounded, and halves round up: both as ggml does, so that codes and
scales are bit-equal to those of a GGUF file made from the same fp32 weight.

Source: ggml ``quantize_row_q4_0_ref``, which ``gguf`` 0.19 (``quants.py``) reproduces.
Shapes: O = out_features, I = in_features, G = blocks along I, N = 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.quant.base import QTensor, Quantizer, row_blocks, width_of
from qaft.quant.masks import check_mask, inside, wants_mask
from qaft.quant.ste import straight_through

_BLOCK = 32
_LOW, _HIGH = -8, 7

_SMALLEST = torch.finfo(torch.float32).tiny
"""Below it 1 / d may be infinite. fp16(d) is zero long before, so that the codes mean nothing."""

_DITHER = 0.499
"""Largest dither in steps. The margin to 1/2 covers the fp32 rounding of w (1 / d) + 8.5, below 2^-19."""


class Q4_0(Quantizer):
    """The Q4_0 grid of GGUF files; scales are fp16 whatever the dtype of the model.

    Args:
        ste: where the gradient passes: identity, clamp or trust.

    Raises:
        ValueError: there is no such mask.
    """

    def __init__(self, *, ste: str = "clamp") -> None:
        super().__init__()
        self.bits = 4
        self.group_size: int = _BLOCK
        self.symmetric = True
        self.ste = check_mask(ste)

    def quantize(self, weight: Tensor) -> QTensor:
        """Return codes int8 [O, I] in [-8, 7] and scales fp16 [O, G], which are negative where the maximum is positive.

        Raises:
            ValueError: I is not divisible by 32, the weight has a value that is not finite, or a scale exceeds fp16.
        """
        weight = weight.detach()
        num_groups = self._num_groups(weight)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float16, device=weight.device)
        for rows in row_blocks(weight):
            levels, _, stored = self._levels(weight[rows], num_groups)
            values[rows], scale[rows] = levels.flatten(1), stored
        if not torch.isfinite(scale).all():
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"the weight {list(weight.shape)} has values that are not finite: it cannot be quantized"
                )
            raise ValueError("a scale exceeds the largest torch.float16, 65504, which q4_0 stores: use an int grid")
        return QTensor(values, scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize(torch.float32)``, [O, I], with the straight-through gradient.

        A value that is not finite makes its block NaN instead of raising: a check would stall the device in every step,
        and a NaN reaches the loss, which the training loop checks.
        """
        return straight_through(weight, *self._quantized_values(weight, masked=wants_mask(weight, self.ste)))

    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents ``d (q + u)``, u uniform in (-1/2, 1/2), that quantize exactly to ``quantized``.

        One weight of level -8 in each block stays exact, it sets the scale; the others of that level move inwards.
        Result: [O, I].

        Args:
            quantized: what ``quantize`` of this grid returned.
            generator: source of u; its device need not be that of ``quantized``.

        Raises:
            ValueError: no latents have these codes and scales (a block without level -8, or a foreign scale).
        """
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = ((2 * uniform - 1) * _DITHER).to(quantized.values.device)
        for rows in row_blocks(latents):
            scale = quantized.scale[rows].float().unsqueeze(-1)
            dither = latents[rows].unflatten(-1, (scale.shape[1], -1))
            levels = quantized.values[rows].float().view_as(dither)
            lowest = levels == _LOW
            dither.copy_(torch.where(lowest, dither.abs(), dither))
            dither.masked_fill_(lowest & (lowest.cumsum(-1) == 1), 0.0)
            dither.add_(levels).mul_(scale)
        return self._checked_dither(latents, quantized)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"ste={self.ste!r}"

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        num_groups = self._num_groups(weight)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if masked else None
        for rows in row_blocks(weight):
            levels, scaled, stored = self._levels(weight[rows], num_groups)
            out[rows] = (levels * stored.float().unsqueeze(-1)).flatten(1)
            if mask is not None:
                # The lowest level is the extreme, which only the rounding of 1 / d puts outside.
                mask[rows] = inside(scaled, -torch.inf, _HIGH, ste=self.ste, half_step=0.5).flatten(1)
        return out, mask

    def _levels(self, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the levels and ``w (1 / d)``, both fp32 [O, G, N], and fp16(d) [O, G]."""
        blocks = weight.float().unflatten(-1, (num_groups, -1))
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = extreme / _LOW
        # ggml multiplies by the reciprocal; a quotient would give other codes next to a boundary.
        scaled = blocks * torch.where(scale.abs() < _SMALLEST, 0.0, 1 / scale)
        levels = (scaled + 8.5).trunc_().clamp_(max=15).sub_(8)
        return levels, scaled, scale.squeeze(-1).half()

    def _num_groups(self, weight: Tensor) -> int:
        in_features = width_of(weight)
        if in_features % _BLOCK:
            raise ValueError(
                f"in_features={in_features} is not divisible by {_BLOCK}, the block size of q4_0: use an int grid for "
                "this layer"
            )
        return in_features // _BLOCK
