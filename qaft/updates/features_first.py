"""Activations with a row for each feature, for products that take rows of features together, and back.

What comes back has a row for each token again, as the tensors that it is added to: elementwise operations over two
layouts, or over a view by columns, take some five times as long.

Shapes: I = features, T = tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def features_first(x: Tensor) -> Tensor:
    """Return ``x^T``, [..., I] -> [I, T], contiguous."""
    return x.flatten(0, -2).T.contiguous()


def tokens_first(features: Tensor, leading: torch.Size) -> Tensor:
    """Return the inverse of ``features_first``, [I, T] -> [*leading, I], contiguous."""
    return features.T.contiguous().view(*leading, len(features))
