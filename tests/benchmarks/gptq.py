"""A GPTQ-style baseline: columns are rounded one after another, and what each loses is made up for by those to come.

    H = E[x x^T],  U^T U = (H + damping mean(diag H) I)^-1,  U upper triangular
    for each column j:  e_j = (w_j - Q(w_j)) / U_jj,  w_k <- w_k - e_j U_jk  for k > j

Inputs come from the blocks before, already rounded; all linears of one block are rounded together; columns keep their
order; a group's scale follows from its weights as they are when its first column is reached.

Source: GPTQ, arXiv 2210.17323, algorithm 1.
Shapes: O = out_features, I = in_features, G = groups along I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaft.bases.dense import DenseBase
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import adapted_layers, replace_module
from qaft.layers.inputs import input_of, put_before
from qaft.quant.affine import Affine

LAZY_COLUMNS = 128
"""Columns after which the rest of the matrix is brought up to date."""


def gptq_weight(weight: Tensor, hessian: Tensor, grid: Affine, *, damping: float = 0.01) -> Tensor:
    """Return the weight on its grid, fp32 [O, I].

    Args:
        weight: [O, I].
        hessian: ``sum x x^T`` over the inputs, [I, I]; any positive factor.
        grid: gives each group its scale and zero point.
        damping: part of the mean diagonal that is added to the diagonal.
    """
    work = weight.double().clone()
    upper = _inverse_factor(hessian.double(), damping)
    width = work.shape[1]
    group = grid.group_size or width
    lazy = min(group, LAZY_COLUMNS)
    for start in range(0, width, lazy):
        if start % group == 0:
            scale, zero = _scale_of(work[:, start : start + group], grid)
        end = min(start + lazy, width)
        errors = torch.empty(len(work), end - start, dtype=work.dtype)
        for j in range(start, end):
            rounded = scale * ((work[:, j] / scale).round().add(zero).clamp(grid.q_min, grid.q_max) - zero)
            error = (work[:, j] - rounded) / upper[j, j]
            work[:, j] = rounded
            work[:, j + 1 : end] -= torch.outer(error, upper[j, j + 1 : end])
            errors[:, j - start] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return work.float()


def gptq_round(model: Any, blocks: Sequence[str], inputs: Mapping[str, Any], real: Tensor) -> None:
    """Replace every trained linear of the blocks by its dense weight on its own grid, block after block.

    Args:
        model: whose linears are all adapted, on affine grids.
        blocks: names of the decoder layers.
        inputs: arguments of the model, for one batch [B, T], without a cache: each block runs twice.
        real: bool [B, T], False at padding.
    """
    for name in blocks:
        _round_when_reached(model.get_submodule(name), real)
    with torch.no_grad():
        model(**inputs)


def _round_when_reached(block: nn.Module, real: Tensor) -> None:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        layers = adapted_layers(block)
        for name, hessian in _hessians(block, layers, args, kwargs, real).items():
            layer = layers[name]
            assert isinstance(layer.quantizer, Affine)
            weight = gptq_weight(layer.latent(), hessian, layer.quantizer)
            dense = DenseBase(weight.to(layer.dtype), layer.bias)
            if (online := input_of(layer)) is not None:
                put_before(dense, online)
            replace_module(block, name, dense)

    handle = block.register_forward_pre_hook(before, with_kwargs=True)


def _hessians(
    block: nn.Module, layers: Mapping[str, AdaptedLinear], args: tuple[Any, ...], kwargs: dict[str, Any], real: Tensor
) -> dict[str, Tensor]:
    """Return ``sum x x^T`` over the real tokens for each linear, x as it is multiplied (rotated and quantized)."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0][real].float()
            found[name] = x.T @ x

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag((damping * diagonal.mean()).clamp(min=1e-12).expand(len(hessian)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _scale_of(group: Tensor, grid: Affine) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of each row of one group, fp64 [O]."""
    one_group = Affine(
        bits=grid.bits,
        group_size=None,
        symmetric=grid.symmetric,
        range=grid.range.kind,
        clip=grid.range.clip,
        scale_dtype=grid.scale_dtype,
    )
    codes = one_group.quantize(group.float())
    zero = torch.zeros(len(group)) if codes.zero_point is None else codes.zero_point[:, 0]
    return codes.scale[:, 0].double(), zero.double()
