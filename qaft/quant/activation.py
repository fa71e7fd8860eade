"""Fake quantization of activations: every vector along the last axis (a token) gets its own scale.

    symmetric    s = c max |x| / q_max,                           q = clamp(round(x / s), -q_max, q_max),  x^ = s q
    asymmetric   s = c (max(x, 0) - min(x, 0)) / (2^b - 1),       q = clamp(round(x / s) + z, 0, 2^b - 1)
                 z = round(-c min(x, 0) / s)                      x^ = s (q - z)

Symmetric with c = 1 is what int8 and int4 kernels of servers compute per token; they have no zero point. Asymmetric
with c = 0.95 is what RoSTE trained. x / s is formed as ``x (1 / s)``, which is how kernels form it: a quotient would
round some values next to a boundary to the other side. Computed in fp32, and rounded once, to the dtype of x.

The scales follow the tokens and are constants in backward. The range includes 0, so that a constant vector has a scale
(the paper's formula divides zero by zero there); a vector of zeros stays one.

A CPU with a compiler and a GPU read and write x once (``native/token.cpp``, ``triton_token.py``), with the bits of the
reference here.

Source: RoSTE (arXiv 2502.09003), equation 6, with both ends of the range clipped as in its released code; vLLM
``csrc/quantization`` (dynamic per-token int8).
Shapes: x [..., D].
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from qaft.native.build import address, library
from qaft.native.gpu import on_triton
from qaft.quant.base import row_blocks
from qaft.quant.masks import check_mask, inside, wants_mask
from qaft.quant.scales import quotient
from qaft.quant.ste import straight_through

_SMALLEST = torch.finfo(torch.float32).tiny

_KERNELS = {torch.float32: "quantize_tokens_fp32", torch.bfloat16: "quantize_tokens_bf16"}
"""What the C++ of CPUs has; the same numbers as the reference below."""


class TokenQuantizer(nn.Module):
    """Rounds each vector along the last axis to its own integer grid, with the straight-through gradient. No state.

    Args:
        bits: b, 2 to 8.
        symmetric: no zero point.
        clip: c, the part of the range that is kept, in (0, 1].
        ste: where the gradient passes: identity (the paper), clamp or trust. Without a clip nothing is outside.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, bits: int = 8, symmetric: bool = True, clip: float = 1.0, ste: str = "identity") -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits} must be in [2, 8]")
        if not 0 < clip <= 1:
            raise ValueError(f"clip={clip} must be in (0, 1]")
        self.bits = bits
        self.symmetric = symmetric
        self.clip = clip
        self.ste = check_mask(ste)
        self.q_max = (1 << (bits - 1)) - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid of each of its vectors, [..., D] in the dtype of x.

        A value that is not finite makes its vector NaN: a check would stall the device in every step, and a NaN reaches
        the loss, which the training loop checks.

        Raises:
            ValueError: x has no last axis, or it is empty.
        """
        if not x.shape or not x.shape[-1]:
            raise ValueError(f"x {list(x.shape)}: the last axis must hold at least one value")
        return straight_through(x, *self._quantized(x, masked=self.clip < 1 and wants_mask(x, self.ste)))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers that ``x`` is rounded to, q - z, int16 [..., D]: what a kernel multiplies."""
        scale, low, high = self._range(x.float())
        return torch.clamp((x.float() * (1 / scale)).round_(), low, high).to(torch.int16)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"bits={self.bits}, symmetric={self.symmetric}, clip={self.clip}, ste={self.ste!r}"

    @torch.no_grad()
    def _quantized(self, x: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        tokens = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and x.dtype in _KERNELS and (kernels := library("token")) is not None:
            return self._in_one_pass(getattr(kernels, _KERNELS[x.dtype]), tokens.contiguous(), x.shape, masked=masked)
        if on_triton(x):
            from qaft.quant.triton_token import MAX_WIDTH, fake_quantize_tokens

            if x.shape[-1] <= MAX_WIDTH:
                options = {"bits": self.bits, "symmetric": self.symmetric, "clip": self.clip, "ste": self.ste}
                out, mask = fake_quantize_tokens(tokens, **options, masked=masked)
                return out.view(x.shape), None if mask is None else mask.view(x.shape)
        return self._in_torch(tokens, x.shape, masked=masked)

    def _in_torch(self, tokens: Tensor, shape: torch.Size, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(tokens)
        mask = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device) if masked else None
        for rows in row_blocks(tokens):
            wide = tokens[rows].float()
            scale, low, high = self._range(wide)
            scaled = wide * (1 / scale)
            if mask is not None:
                mask[rows] = inside(scaled, low, high, ste=self.ste, half_step=0.5)
            scaled.round_()
            # Unclipped symmetric values are within 2^-22 of the range: they round into it.
            levels = scaled if self.symmetric and self.clip == 1 else torch.clamp(scaled, low, high, out=scaled)
            out[rows] = levels.mul_(scale)
        return out.view(shape), None if mask is None else mask.view(shape)

    def _in_one_pass(
        self, kernel: Any, tokens: Tensor, shape: torch.Size, *, masked: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(tokens)
        mask = torch.empty(tokens.shape, dtype=torch.bool) if masked else None
        top = self.q_max if self.symmetric else (1 << self.bits) - 1
        margin = 0.5 if self.ste == "trust" else 0.0
        sizes = (ctypes.c_long(size) for size in tokens.shape)
        numbers = (ctypes.c_float(number) for number in (top, self.clip, _SMALLEST, margin))
        pointers = address(tokens), address(out), None if mask is None else address(mask)
        kernel(*pointers, *sizes, int(self.symmetric), *numbers, torch.get_num_threads())
        return out.view(shape), None if mask is None else mask.view(shape)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return s, and the lowest and the highest level in units of s, all fp32 [..., 1]."""
        # Not aminmax: its reduction over the last axis is not vectorized on CPUs and takes four times that of both.
        if self.symmetric:
            scale = quotient(self.clip * x.abs().amax(-1, keepdim=True), self.q_max).clamp_(min=_SMALLEST)
            high = torch.full_like(scale, self.q_max)
            return scale, -high, high
        bottom = x.amin(-1, keepdim=True).clamp_(max=0)
        span = x.amax(-1, keepdim=True).clamp_(min=0) - bottom
        num_steps = (1 << self.bits) - 1
        scale = quotient(self.clip * span, num_steps).clamp_(min=_SMALLEST)
        low = (self.clip * bottom / scale).round_()
        return scale, low, low + num_steps
