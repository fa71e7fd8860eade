"""Hidden states first, logits a few rows at a time: what every evaluation that scores tokens shares.

Shapes: B = batch, T = time, N = chosen positions, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qaft.errors import ModelError

LOGITS_PER_CHUNK = 2**24
"""Logits alive at once: 64 MiB in fp32."""

_TOLERANCE = 0.02
"""Largest allowed difference to the model's own logits, relative; bf16 rounding stays below half of it."""


class TokenScorer:
    """Log-probabilities of chosen next tokens under a transformers causal LM, without the logits of whole sequences.

    Args:
        model: a causal LM in evaluation mode.

    Raises:
        ModelError: the model has no output embeddings, or scales its logits in a way that is not known here.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings; give a causal language model")
        self.device: torch.device = next(model.get_input_embeddings().parameters()).device
        # Only Gemma-like families have the key, and transformers gives the others no default.
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._check_logits()

    def hidden(self, sequences: Sequence[Tensor]) -> Tensor:
        """Return the last hidden states of int64 sequences, padded at the end to [B, T, H]."""
        ids = pad_sequence([s.long() for s in sequences], batch_first=True).to(self.device)
        lengths = torch.tensor([len(s) for s in sequences], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).long()
        output = self.model.get_decoder()(
            input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False
        )
        return output.last_hidden_state

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return ``log p(target)`` of each row, hidden [N, H] and targets [N] -> fp32 [N]."""
        chosen = [
            logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(-1)
            for rows, logits in self._chunks(hidden)
        ]
        return torch.cat(chosen) if chosen else hidden.new_zeros(0, dtype=torch.float32)

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, LOGITS_PER_CHUNK // self.model.config.get_text_config().vocab_size)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            yield rows, self._logits(hidden[rows])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _check_logits(self) -> None:
        tokens = torch.arange(8) % self.model.get_input_embeddings().num_embeddings
        own = self.model(input_ids=tokens[None].to(self.device), use_cache=False).logits[0].float()
        gap = (self._logits(self.hidden([tokens])[0]) - own).abs().max()
        if not gap <= _TOLERANCE * own.abs().max():
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not head(hidden states), they differ by "
                f"{float(gap):.3g}; logit scaling other than final_logit_softcapping is not supported"
            )
