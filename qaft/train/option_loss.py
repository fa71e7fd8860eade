"""The loss of a choice between options that continue one prompt, from one pass over all of them.

    L = sum over rows of  -log softmax_k(score(k))[chosen],    score(k) = sum of log p over the tokens of option k

Tokens that all options begin with are in every score and in no difference of scores, so they are left out; see
``qaft/data/options.py`` for the rows. Evaluation chooses by the same scores (``qaft/evaluate/classification.py``).

Shapes: B = rows, T = tokens of a row, S = places where something is predicted, K = options, H = hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qaft.models.tree_mask import tree_mask
from qaft.sections import DataSection
from qaft.train.loss import IGNORE_INDEX, CausalLoss, group_sums


class OptionsLoss(nn.Module):
    """``batch of rows with options -> sum of losses over rows``; what an engine wraps instead of ``CausalLoss``.

    Args:
        loss: knows decoder and head.
    """

    def __init__(self, loss: CausalLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        places: Tensor,
        tokens: Tensor,
        chosen: Tensor,
        branches: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of losses over the rows, a scalar in at least fp32; with ``groups`` one for each, fp64 [G].

        Args:
            input_ids: [B, T].
            position_ids: [B, T].
            places: [B, S], columns from which tokens are predicted.
            tokens: [B, S, K], those of each option; ``IGNORE_INDEX`` where it has none.
            chosen: [B], the right option; ``IGNORE_INDEX`` for a row without loss.
            branches: [B, T], see ``tree_mask``; None for causal attention.
            groups: [B, 1], index of the sum to which the loss of a row is added; the sums have no gradient.
        """
        mask = None if branches is None else tree_mask(self.loss.model, branches)
        hidden = self.loss.hidden_states(input_ids, position_ids, mask)  # [B, T, H]
        hidden = hidden.take_along_dim(places.unsqueeze(-1), dim=1).flatten(0, 1)  # [B S, H]
        is_token = tokens != IGNORE_INDEX
        log_probs = self.loss.log_probs(hidden, tokens.clamp_min(0).flatten(0, 1)).view(tokens.shape)
        scores = log_probs.where(is_token, 0.0).sum(1)  # [B, K]
        if groups is None:
            return F.cross_entropy(scores, chosen, ignore_index=IGNORE_INDEX, reduction="sum")
        losses = F.cross_entropy(scores, chosen, ignore_index=IGNORE_INDEX, reduction="none")
        return group_sums(losses, groups.squeeze(1), count=int(groups.max()) + 1)


TaskLoss = CausalLoss | OptionsLoss


def task_loss(loss: CausalLoss, data: DataSection) -> TaskLoss:
    """Return the loss module for the batches of a recipe's data."""
    return OptionsLoss(loss) if data.scores_options else loss
