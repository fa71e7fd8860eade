"""What the block formats of GGUF share: blocks of 32 inputs with one fp16 scale each.

    w^ = fp16(d) q,  d and the codes q follow from the block in fp32, before d is rounded

Codes are computed as ggml does, so that codes and scales are bit-equal to those of a GGUF file made from the same fp32
weight.

Shapes: O = out_features, I = in_features, G = blocks along I, N = 32.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from qaft.quant.base import QTensor, Quantizer, row_blocks, width_of
from qaft.quant.masks import check_mask, inside, wants_mask
from qaft.quant.ste import straight_through

BLOCK = 32

DITHER = 0.499
"""Largest dither in steps. The margin to 1/2 covers the fp32 rounding of w (1 / d), below 2^-16."""

_SMALLEST = torch.finfo(torch.float32).tiny
"""Below it 1 / d may be infinite. fp16(d) is zero long before, so that the codes mean nothing."""


class GgmlBlocks(Quantizer):
    """A block format of GGUF; scales are fp16 whatever the dtype of the model.

    Args:
        bits: stored bits per weight, without scales.
        ste: where the gradient passes: identity, clamp or trust.

    Raises:
        ValueError: there is no such mask.
    """

    def __init__(self, *, bits: int, ste: str) -> None:
        super().__init__()
        self.bits = bits
        self.group_size: int = BLOCK
        self.symmetric = True
        self.scale_dtype = torch.float16
        self.ste = check_mask(ste)

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the format in recipes."""

    @abstractmethod
    def _block_scale(self, blocks: Tensor) -> Tensor:
        """Return d of ``blocks`` (fp32 [O, G, N]), fp32 [O, G, 1]."""

    @abstractmethod
    def _round(self, scaled: Tensor) -> Tensor:
        """Return the level of each ``w (1 / d)``, fp32 of the same shape."""

    @abstractmethod
    def _limits(self) -> tuple[float, float]:
        """Return between which ``w (1 / d)`` nothing is clipped."""

    def quantize(self, weight: Tensor) -> QTensor:
        """Return codes int8 [O, I] and scales fp16 [O, G], which may be negative.

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
            raise ValueError(
                f"a scale exceeds the largest torch.float16, 65504, which {self.kind} stores: use an int grid"
            )
        return QTensor(values, scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize(torch.float32)``, [O, I], with the straight-through gradient.

        A value that is not finite makes its block NaN instead of raising: a check would stall the device in every step,
        and a NaN reaches the loss, which the training loop checks.
        """
        return straight_through(weight, *self._quantized_values(weight, masked=wants_mask(weight, self.ste)))

    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents ``d (q + u)``, u uniform in (-1/2, 1/2), that quantize exactly to ``quantized``.

        One weight of the level that sets the scale stays exact in each block; the others of it move inwards.
        Result: [O, I].

        Args:
            quantized: what ``quantize`` of this grid returned.
            generator: source of u; its device need not be that of ``quantized``.

        Raises:
            ValueError: no latents have these codes and scales (a block without that level, or a foreign scale).
        """
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = ((2 * uniform - 1) * DITHER).to(quantized.values.device)
        for rows in row_blocks(latents):
            scale = quantized.scale[rows].float().unsqueeze(-1)
            dither = latents[rows].unflatten(-1, (scale.shape[1], -1))
            levels = quantized.values[rows].float().view_as(dither)
            extreme = self._is_extreme(levels)
            dither.copy_(torch.where(extreme, dither.abs() * -levels.sign(), dither))
            dither.masked_fill_(extreme & (extreme.cumsum(-1) == 1), 0.0)
            dither.add_(levels).mul_(scale)
        if not self.quantize(latents).equals(quantized):
            raise ValueError(
                f"these codes and scales are no result of {type(self).__name__}, so no latent weight quantizes to them:"
                " dequantize them, and quantize with this grid first"
            )
        return latents

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"ste={self.ste!r}"

    @abstractmethod
    def _is_extreme(self, levels: Tensor) -> Tensor:
        """Return which ``levels`` are those of the weight that sets the scale of its block, bool of the same shape."""

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        num_groups = self._num_groups(weight)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if masked else None
        low, high = self._limits()
        for rows in row_blocks(weight):
            levels, scaled, stored = self._levels(weight[rows], num_groups)
            out[rows] = (levels * stored.float().unsqueeze(-1)).flatten(1)
            if mask is not None:
                mask[rows] = inside(scaled, low, high, ste=self.ste, half_step=0.5).flatten(1)
        return out, mask

    def _levels(self, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the levels and ``w (1 / d)``, both fp32 [O, G, N], and fp16(d) [O, G]."""
        blocks = weight.float().unflatten(-1, (num_groups, -1))
        scale = self._block_scale(blocks)
        # ggml multiplies by the reciprocal; a quotient would give other codes next to a boundary.
        scaled = blocks * torch.where(scale.abs() < _SMALLEST, 0.0, 1 / scale)
        return self._round(scaled), scaled, scale.squeeze(-1).half()

    def _num_groups(self, weight: Tensor) -> int:
        in_features = width_of(weight)
        if in_features % BLOCK:
            raise ValueError(
                f"in_features={in_features} is not divisible by {BLOCK}, the block size of {self.kind}: use an int "
                "grid for this layer"
            )
        return in_features // BLOCK
