"""Activation statistics of linear layers over a few batches: one pass, shared by every selection that needs data.

Scores are those of Wanda-type pruning as RoCoFT uses them (arXiv 2410.10075, section 3):

    column j:  ||x_j||_2 * sum_i |W_ij|          row i:  ||y_i||_2 * sum_j |W_ij|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear


@dataclass(frozen=True)
class LayerScores:
    """``rows`` [O] and ``columns`` [I], fp32."""

    rows: Tensor
    columns: Tensor


@torch.no_grad()
def capture_scores(
    layers: Mapping[str, FrozenLinear], batches: Iterable[object], run: Callable[[object], object]
) -> dict[str, LayerScores]:
    """Return importance scores of each layer's rows and columns.

    Args:
        layers: name -> layer; hooked for the duration of the call only.
        batches: calibration batches without padding.
        run: evaluates the model on one batch.
    """
    squares = {n: (torch.zeros(m.out_features), torch.zeros(m.in_features)) for n, m in layers.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def collect(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows, columns = squares[name]
            rows += output.float().pow(2).flatten(0, -2).sum(0).cpu()
            columns += inputs[0].float().pow(2).flatten(0, -2).sum(0).cpu()

        return collect

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _scores(layers[name], *squares[name]) for name in layers}


def _scores(layer: FrozenLinear, row_squares: Tensor, column_squares: Tensor) -> LayerScores:
    magnitude = layer.dequantize().float().abs().cpu()
    return LayerScores(rows=row_squares.sqrt() * magnitude.sum(1), columns=column_squares.sqrt() * magnitude.sum(0))
