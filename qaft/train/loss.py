"""Next-token loss that never holds the full logits.

    L = sum over targets t of  logsumexp(z_t) - z_t[y_t],      z_t = cap(W h_t + b),   cap(z) = c tanh(z / c) or z
    dL/dh_t = ((softmax(z_t) - onehot(y_t)) * cap'(z_t)) W

Only hidden states with a target reach the head, a few hundred rows at a time. With a frozen head dL/dh is computed in
the forward pass, so that each row of logits is built once and what backward keeps is [N, H].

A chunk of logits stays in the dtype of the model; softmax and loss are fp32, over blocks of rows that fit the caches,
and the residual replaces the logits. ``tests/benchmarks/head_loss.py`` compares it with full logits and with torch's
``linear_cross_entropy``, which sums and returns the loss in bf16 (1.8 % off).

Shapes: B = batch, T = time, N = targets, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qaft.errors import ModelError
from qaft.layers.mode import evaluating

IGNORE_INDEX = -100
"""Label of a position without loss, as in transformers."""

LOGITS_PER_CHUNK = 2**24
"""Logits alive at once: 32 MiB in 16 bits. 341 rows at V = 49152: with fewer the products are bound by reading W."""

_LOGITS_PER_BLOCK = 2**18
"""Logits in fp32 at once on a CPU, per thread: 1 MiB, within the second-level cache of current server cores."""

_SMALLEST_CHUNK = 16


def _softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunks(num_rows: int, vocabulary: int, logits_per_chunk: int) -> list[slice]:
    rows = max(_SMALLEST_CHUNK, logits_per_chunk // vocabulary)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _blocks(logits: Tensor) -> list[slice]:
    """Return slices of rows whose fp32 copies stay in the caches of a CPU; on other devices all rows in one."""
    if logits.device.type != "cpu":
        return [slice(None)]
    rows = max(1, _LOGITS_PER_BLOCK * torch.get_num_threads() // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _loss_of(
    logits: Tensor, chosen: Tensor, softcap: float | None, wide: torch.dtype, *, leave_residual: bool
) -> Tensor:
    """Return the sum of losses of ``logits`` [rows, V] for targets ``chosen`` [rows, 1].

    With ``leave_residual`` dL/dlogits takes the place of the logits.
    """
    if softcap is None:
        slope, log_probs = None, torch.log_softmax(logits, dim=-1, dtype=wide)
    else:
        capped = _softcapped(logits.to(wide), softcap)
        slope, log_probs = 1 - (capped / softcap).square_(), torch.log_softmax(capped, dim=-1)
    loss = -log_probs.gather(1, chosen).sum()
    if not leave_residual:
        return loss
    residual = log_probs.exp_()
    residual.scatter_add_(1, chosen, residual.new_full(chosen.shape, -1.0))
    if slope is not None:
        residual *= slope
    logits.copy_(residual)
    return loss


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of cross entropies over a head that is not trained; saves dL/dh [N, H] and nothing of the head."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logits_per_chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), len(weight), logits_per_chunk):
            logits = F.linear(hidden[rows], weight, bias)  # [rows, V]
            for block in _blocks(logits):
                chosen = targets[rows][block, None]
                total += _loss_of(logits[block], chosen, softcap, wide, leave_residual=gradient is not None)
            if gradient is not None:
                gradient[rows] = logits @ weight
            del logits  # or this chunk and the next would be alive together
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            # dL/dh was built without a graph, so its derivative would be silently incomplete.
            raise RuntimeError("the chunked loss has no second derivative; call backward without create_graph")
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None, None


def _trained_head_loss(
    hidden: Tensor, targets: Tensor, head: nn.Module, softcap: float | None, logits_per_chunk: int, vocabulary: int
) -> Tensor:
    """Return the same sum through any head module; each chunk is recomputed in backward, so no logits are kept."""
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def chunk_loss(rows: Tensor, chosen: Tensor) -> Tensor:
        return F.cross_entropy(_softcapped(head(rows).to(wide), softcap), chosen, reduction="sum")

    total = torch.zeros((), dtype=wide, device=hidden.device)
    # A micro-batch without targets still passes the head once, so that every trained parameter gets a (zero) gradient.
    for rows in _chunks(len(hidden), vocabulary, logits_per_chunk) or [slice(0, 0)]:
        total = total + checkpoint(chunk_loss, hidden[rows], targets[rows], use_reentrant=False)
    return total


@torch.no_grad()
def _target_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, softcap: float | None, logits_per_chunk: int, vocabulary: int
) -> Tensor:
    """Return the loss of every target, [N], without a gradient."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    for rows in _chunks(len(hidden), vocabulary, logits_per_chunk):
        logits, chosen, into = head(hidden[rows]), targets[rows], losses[rows]
        for block in _blocks(logits):
            into[block] = F.cross_entropy(_softcapped(logits[block].to(wide), softcap), chosen[block], reduction="none")
        del logits  # or this chunk and the next would be alive together
    return losses


def group_sums(losses: Tensor, groups: Tensor, *, count: int) -> Tensor:
    """Return the sums of ``losses`` [N] by their ``groups`` [N], fp64 [count]."""
    sums = torch.zeros(count, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, groups, losses.double())


class CausalLoss(nn.Module):
    """A transformers causal language model as ``batch -> sum of losses over targets``; what an engine wraps.

    Args:
        model: a transformers causal LM (``get_decoder``, ``get_output_embeddings``, ``config``), held, not copied.
        logits_per_chunk: logits that may be alive at once.

    Raises:
        ModelError: the model has no output embeddings.
    """

    def __init__(self, model: Any, *, logits_per_chunk: int = LOGITS_PER_CHUNK) -> None:
        super().__init__()
        if model.get_output_embeddings() is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings; give a causal language model")
        self.model = model
        self.logits_per_chunk = logits_per_chunk
        # Only Gemma-like families have the key, and transformers gives the others no default.
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of losses over all targets, a scalar in at least fp32; with ``groups`` one for each, fp64 [G].

        Args:
            input_ids: [B, T].
            labels: [B, T], not shifted: position t is predicted from t - 1; ``IGNORE_INDEX`` carries no loss.
            position_ids: [B, T]; restarts at 0 mark packed samples when there is no attention mask.
            attention_mask: [B, T], 1 for tokens; None when nothing is padded.
            groups: [B, T], index of the sum to which the loss of a label is added; the sums have no gradient.
        """
        hidden, targets = self.at_targets(input_ids, labels, position_ids, attention_mask)
        if groups is not None:
            return self._group_losses(hidden, targets, groups, labels[:, 1:] != IGNORE_INDEX)
        return self.head_loss(hidden, targets)

    def at_targets(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states from which targets are predicted, [N, H], and the targets, [N]."""
        hidden = self.hidden_states(input_ids, position_ids, attention_mask)[:, :-1]
        targets = labels[:, 1:]
        has_target = targets != IGNORE_INDEX
        return hidden[has_target], targets[has_target]

    def over_logits(self, term: Callable[..., Tensor], *hidden: Tensor) -> Tensor:
        """Return ``term`` of the logits of each of ``hidden`` [N, H], summed over N in chunks that backward recomputes.

        Args:
            term: logits in at least fp32, one [n, V] for each of ``hidden`` -> a sum over n.
            *hidden: hidden states of the same positions.
        """

        def chunk(*rows: Tensor) -> Tensor:
            return term(*(self._logits(row) for row in rows))

        total = torch.zeros((), dtype=torch.promote_types(hidden[0].dtype, torch.float32), device=hidden[0].device)
        vocabulary = self.model.config.get_text_config().vocab_size
        for rows in _chunks(len(hidden[0]), vocabulary, self.logits_per_chunk // len(hidden)):
            total = total + checkpoint(chunk, *(states[rows] for states in hidden), use_reentrant=False)
        return total

    def log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return ``log p`` of several tokens after each of ``hidden`` [N, H], in chunks that backward recomputes.

        Args:
            hidden: [N, H], N at least 1.
            tokens: [N, K].

        Returns:
            [N, K] in at least fp32.
        """

        def chunk(rows: Tensor, chosen: Tensor) -> Tensor:
            return self._logits(rows).log_softmax(-1).gather(1, chosen)

        vocabulary = self.model.config.get_text_config().vocab_size
        chunks = _chunks(len(hidden), vocabulary, self.logits_per_chunk)
        return torch.cat([checkpoint(chunk, hidden[rows], tokens[rows], use_reentrant=False) for rows in chunks])

    def _logits(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return _softcapped(self.model.get_output_embeddings()(hidden).to(wide), self.softcap)

    def _group_losses(self, hidden: Tensor, targets: Tensor, groups: Tensor, has_target: Tensor) -> Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size
        head = self.model.get_output_embeddings()
        losses = _target_losses(hidden, targets, head, self.softcap, self.logits_per_chunk, vocabulary)
        return group_sums(losses, groups[:, 1:][has_target], count=int(groups.max()) + 1)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Return the decoder's last hidden states, [B, T, H]; a mask may be one of four axes, [B, 1, T, T]."""
        output = self.model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        )
        return output.last_hidden_state

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of losses of ``targets`` [N] from ``hidden`` [N, H]."""
        head = self.model.get_output_embeddings()
        # Exactly nn.Linear: a subclass (a packed layer, say) may not compute F.linear(x, weight, bias).
        if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
            return _FrozenHeadLoss.apply(hidden, targets, head.weight, head.bias, self.softcap, self.logits_per_chunk)  # type: ignore[return-value]
        vocabulary = self.model.config.get_text_config().vocab_size
        return _trained_head_loss(hidden, targets, head, self.softcap, self.logits_per_chunk, vocabulary)

    @torch.no_grad()
    def verify_head(self, *, tolerance: float = 0.02) -> None:
        """Guarantee that this loss sees the logits of the model's own forward; costs one forward over eight tokens.

        Some families scale their logits after the head; training on other logits than those served would go unseen.

        Args:
            tolerance: allowed difference as a fraction of the largest logit; bf16 rounding stays below 0.01.

        Raises:
            ModelError: the logits differ, or are not finite.
        """
        embeddings = self.model.get_input_embeddings()
        tokens = torch.arange(8, device=next(embeddings.parameters()).device)[None] % embeddings.num_embeddings
        with evaluating(self):
            theirs = self.model(input_ids=tokens, use_cache=False).logits.float()
            hidden = self.hidden_states(tokens, None, None)
            ours = self._logits(hidden)
        if not bool(theirs.isfinite().all()):
            raise ModelError(
                f"{type(self.model).__name__}: the logits of the base model are not finite before any training; its "
                "weights are damaged, or leave the range of model.dtype: download it again, or set dtype to bfloat16"
            )
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        if not difference <= tolerance:
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not head(hidden states), they differ by {difference:.1%} "
                f"(allowed: {tolerance:.0%}); logit scaling other than final_logit_softcapping is not supported"
            )
