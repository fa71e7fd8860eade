"""Fake quantization of keys (after RoPE) and values: one scale per token and head, on [batch, heads, tokens, head_dim].

    roste   s = c (max - min) / (2^b - 1) over the head's vector, asymmetric: the function of the paper
    vllm    y = H D x;  s = max((max y - min y) / 15, 1e-6),  z = [-min y / s],  q = clamp([y / s + z], 0, 15)
            x^ = D H (s' (q - z)) / head_dim,  s' = s without the 4 lowest bits of its mantissa

H is the Hadamard matrix of +-1 in Sylvester's order, D random signs that are the same for every layer, [.] rounds
halves away from zero. vLLM stores z in the bits that s' lacks. It rotates the query too and un-rotates what attention
returns; the inverse rotation here gives the same scores and outputs with everything else unrotated.

vLLM rounds y to the dtype of the model, and so does this. The sums of y are fp32 here; its GPU kernels may form them in
bf16, so that single codes next to a boundary can differ by one.

Source: RoSTE (arXiv 2502.09003), section 3 and appendix; vLLM 0.29 ``--kv-cache-dtype int4_per_token_head``
(``v1/attention/ops/int4_per_token_head.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qaft.quant.activation import TokenQuantizer
from qaft.quant.ste import straight_through

_SIGN_SEED = 0x9E3779B9
_SMALLEST_SCALE = 1e-6
_TOP = 15.0
_ZERO_POINT_BITS = 4


class KVQuantizer(nn.Module, ABC):
    """A fake quantizer of what the KV cache stores; the same function for keys and values. Holds no trained state."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return what attention reads back for keys or values ``x``, [..., tokens, head_dim] in the dtype of x.

        The gradient is that of the identity.
        """


class RosteKV(KVQuantizer):
    """The KV cache of RoSTE: asymmetric integers per token and head.

    Args:
        bits: 2 to 8.
        clip: c, the part of the range that is kept, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, bits: int = 4, clip: float = 1.0) -> None:
        super().__init__()
        self.token = TokenQuantizer(bits=bits, symmetric=False, clip=clip)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid of each of its vectors, in the dtype of x."""
        return self.token(x)


class VllmKV(KVQuantizer):
    """The int4 KV cache of vLLM (``int4_per_token_head``), which rotates keys and values by itself.

    Args:
        head_dim: the length of a head's vector, a power of two.

    Raises:
        ValueError: head_dim is no power of two, for which vLLM has no such cache.
    """

    def __init__(self, *, head_dim: int) -> None:
        super().__init__()
        if head_dim < 2 or head_dim & (head_dim - 1):
            raise ValueError(
                f"head_dim={head_dim} must be a power of two for the int4 KV cache of vLLM: use function roste"
            )
        self.head_dim = head_dim
        # int8: exact for +-1, and module.to(dtype) leaves integers alone.
        self.register_buffer("rotation", _signed_hadamard(head_dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` as attention reads it back from the cache, in the dtype of x.

        Raises:
            ValueError: the last axis is not head_dim.
        """
        if x.shape[-1:] != (self.head_dim,):
            raise ValueError(f"x {list(x.shape)}: the last axis must be head_dim={self.head_dim}")
        return straight_through(x, self._quantized(x), None)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"head_dim={self.head_dim}"

    @torch.no_grad()
    def _quantized(self, x: Tensor) -> Tensor:
        # autocast would run the products in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            rotation = self.get_buffer("rotation").float()
            rotated = (x.float() @ rotation.T).to(x.dtype).float()
            read = _int4_with_zero_point(rotated)
            return ((read @ rotation) / self.head_dim).to(x.dtype)


def _int4_with_zero_point(x: Tensor) -> Tensor:
    """Return the fp32 vectors ``x`` [..., D] after storage in 4 bits with one scale and zero point each."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / _TOP).clamp_(min=_SMALLEST_SCALE)
    zero = _round_half_away(-low / scale).clamp_(0.0, _TOP)
    codes = _round_half_away(x * (1 / scale) + zero).clamp_(0.0, _TOP)
    stored = (scale.view(torch.int32) & -(1 << _ZERO_POINT_BITS)).view(torch.float32)
    return (codes - zero) * stored


def _round_half_away(x: Tensor) -> Tensor:
    return torch.trunc(x + torch.where(x >= 0, 0.5, -0.5))


def _signed_hadamard(size: int) -> Tensor:
    """Return H D, int8 [size, size]: the Sylvester matrix with vLLM's signs on its columns."""
    index = torch.arange(size)
    common = index.unsqueeze(1) & index
    parity = torch.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    signs = 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0
    return ((1 - 2 * parity) * signs).to(torch.int8)
