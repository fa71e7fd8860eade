"""What quantization does to one linear layer, in a given basis.

    delta_w = ||W^ - W||^2 / ||W||^2                    the paper's lower-level problem, normalized
    delta_x = mean over tokens of ||x^ - x||^2 / ||x||^2
    delta_G = tr((W^ - W) G (W^ - W)^T) / tr(W G W^T),  G = E[x^ x^T]: the weight error as the inputs see it
    delta_y = ||X^ W^^T - X W^T||^2 / ||X W^T||^2       both together: the error of what the layer computes

Training converges to a plateau proportional to the G-weighted error of the weights (theorem 4.3), so rotations are
compared by delta_y, which is delta_G when activations are not quantized.

Source: RoSTE, arXiv 2502.09003, equation 12 and section 4.
Shapes: T = tokens, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Quantize = Callable[[Tensor], Tensor]
"""``x -> x^`` of the same shape."""

_TINY = 1e-30
"""Against division by zero: an input or a weight of zeros has no error."""


@dataclass(frozen=True)
class LinearErrors:
    """How far one linear layer is from itself when it is quantized in some basis.

    Attributes:
        delta_w: relative error of the weight.
        delta_x: relative error of the inputs, mean over tokens.
        delta_g: relative error of the output that comes from the weight.
        delta_y: relative error of the output.
        crest_w: largest weight of a row over its root mean square, mean over rows.
        crest_x: the same of a token's input, mean over tokens.
        top_token: share of the inputs' squared error that one token has.
    """

    delta_w: float
    delta_x: float
    delta_g: float
    delta_y: float
    crest_w: float
    crest_x: float
    top_token: float


@torch.no_grad()
def linear_errors(
    x: Tensor, weight: Tensor, *, weights: Quantize | None, inputs: Quantize | None, energy: float | None = None
) -> LinearErrors:
    """Return the errors of ``x W^T`` under quantization.

    Args:
        x: [T, I], in the basis of the weight.
        weight: [O, I].
        weights: fake quantizer of the weight, or None.
        inputs: fake quantizer of each token, or None.
        energy: ``||X W^T||^2`` to relate delta_g and delta_y to, where that of another basis is meant (a norm's bias
            may be part of it there); None for this one.
    """
    rounded_weight = weight if weights is None else weights(weight)
    rounded_x = x if inputs is None else inputs(x)
    weight_error, x_error = rounded_weight - weight, rounded_x - x
    from_weight = rounded_x @ weight_error.T
    output_error = from_weight + x_error @ weight.T
    energy = max(output_energy(x, weight) if energy is None else energy, _TINY)
    token_errors = x_error.square().sum(-1)
    return LinearErrors(
        delta_w=_ratio(weight_error, weight),
        delta_x=float((token_errors / x.square().sum(-1).clamp(min=_TINY)).mean()),
        delta_g=float(from_weight.square().sum()) / energy,
        delta_y=float(output_error.square().sum()) / energy,
        crest_w=crest_factor(weight),
        crest_x=crest_factor(x),
        top_token=float(token_errors.max() / token_errors.sum().clamp(min=_TINY)),
    )


@torch.no_grad()
def output_energy(x: Tensor, weight: Tensor) -> float:
    """Return ``||X W^T||^2`` of inputs [T, I] and a weight [O, I]."""
    return float((x @ weight.T).square().sum())


@torch.no_grad()
def vector_error(x: Tensor, quantize: Quantize) -> float:
    """Return ``||x^ - x||^2 / ||x||^2`` over all vectors."""
    return _ratio(quantize(x) - x, x)


def crest_factor(x: Tensor) -> float:
    """Return the mean over vectors of max |x| / rms(x); of Gaussian vectors 3.8 at 4096 elements."""
    rms = x.square().mean(-1).sqrt().clamp(min=_TINY)
    return float((x.abs().amax(-1) / rms).mean())


def _ratio(error: Tensor, of: Tensor) -> float:
    return float(error.square().sum() / of.square().sum().clamp(min=_TINY))
