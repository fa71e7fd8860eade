"""MPC: the factors of a low-rank update stay near orthonormal.

    MPC_o:  R = lambda mean over A, B of  ||A A^T - I||,  ||B^T B - I||
    MPC_d:  R = lambda mean over A, B of  ||A A^T - I||,  ||B^T B - diag(B^T B)||       (W = W0 + s B A, Frobenius norm)

The official code takes the norm, the paper its square: the code's is used. MPC_o pulls all singular values of both
factors to 1 whatever the data say, so its weight has to be small; MPC_d leaves B its lengths. A factor of zeros, as B
at the start, is a stationary point of both.

Source: See Further for PEFT (arXiv 2407.05417), section 4, and loralib of Chongjie-Si/Subspace-Tuning. Its MPC_n, a
nonlinearity between the factors, cannot be merged and does not exist here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qaft.layers.adapted import AdaptedLinear
from qaft.regularizers.base import Penalty

VARIANTS = ("o", "d")


class MPC(Penalty):
    """Orthogonality of ``down`` and ``up``; unlike other regularizers it is no pull to where training starts.

    Args:
        weight: lambda.
        variant: ``o`` or ``d``.

    Raises:
        ValueError: weight is not above 0, or the variant is unknown.
    """

    def __init__(self, *, weight: float = 0.01, variant: str = "d") -> None:
        if not weight > 0:
            raise ValueError(f"weight={weight} must be above 0; leave the regularizer out for none")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
        self.weight, self.variant = weight, variant
        self._factors: list[tuple[nn.Parameter, nn.Parameter]] = []

    def prepare(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """Find the factors of each layer.

        Raises:
            ValueError: an update has no two factors.
        """
        for name, layer in layers.items():
            parameters = dict(layer.update.named_parameters())
            if not {"down", "up"} <= parameters.keys():
                raise ValueError(
                    f"mpc: {name} has a {type(layer.update).__name__}, which is no product of two trained factors; set "
                    "update.kind to lowrank or linchain"
                )
            self._factors.append((parameters["down"], parameters["up"]))

    def __call__(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return lambda times the mean norm over all factors."""
        norms = []
        for down, up in self._factors:
            norms.append(_from_identity(down @ down.T))
            gram = up.T @ up
            norms.append(_from_identity(gram) if self.variant == "o" else torch.linalg.norm(gram - gram.diag().diag()))
        return self.weight * torch.stack(norms).mean()


def _from_identity(gram: Tensor) -> Tensor:
    return torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
