from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_run import VOCABULARY, TinyCausalLM
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from qaft.errors import ModelError
from qaft.train.loss import CausalLoss

SMALL = dict(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def naive_loss(model: TinyCausalLM, tokens: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    logits = model.lm_head(model.get_decoder()(tokens).last_hidden_state)[:, :-1]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (3, 9), generator=generator)
    labels = tokens.masked_fill(torch.rand(3, 9, generator=generator) < 0.4, -100)
    return tokens, labels


def kept_for_backward(forward: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward().backward()
    return kept


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_those_of_the_full_logits(
    trained_head: bool,
    bias: bool,
    softcap: float | None,
    dtype: torch.dtype,
    tolerance: float,
    generator: torch.Generator,
) -> None:
    model = TinyCausalLM(softcap=softcap).to(dtype)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, generator=generator).to(dtype))
    model.lm_head.requires_grad_(trained_head)
    tokens, labels = batch(generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    # 16 rows is the smallest chunk, so that the sum runs over an uneven last chunk too.
    loss = CausalLoss(model, logits_per_chunk=1)(tokens, labels)
    expected = naive_loss(model, tokens, labels, softcap)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    # A factor as the objective applies it.
    ours, theirs = torch.autograd.grad(loss / 7, trained), torch.autograd.grad(expected / 7, trained)
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance)


def test_bf16_loss_is_accumulated_in_fp32_and_gradients_match_the_full_logits(generator: torch.Generator) -> None:
    model = TinyCausalLM(hidden=32).to(torch.bfloat16)
    tokens = torch.randint(0, VOCABULARY, (40, 30), generator=generator)
    loss = CausalLoss(model)(tokens, tokens)
    logits = model.lm_head(model.get_decoder()(tokens).last_hidden_state)[:, :-1].flatten(0, 1).float()
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    # Summed in bf16 (8 bits) a total of about 5000 would be off by up to 16.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    weight = model.model.v_proj.weight
    (ours,), (theirs,) = torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight)
    assert (ours - theirs).float().norm() <= 0.01 * theirs.float().norm()


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_tensor_of_the_size_of_the_logits_is_kept_for_backward(
    trained_head: bool, generator: torch.Generator
) -> None:
    model = TinyCausalLM()
    model.lm_head.requires_grad_(trained_head)
    tokens = torch.randint(0, VOCABULARY, (8, 20), generator=generator)
    logits = tokens[:, 1:].numel() * VOCABULARY
    assert max(t.numel() for t in kept_for_backward(lambda: naive_loss(model, tokens, tokens))) >= logits
    kept = kept_for_backward(lambda: CausalLoss(model, logits_per_chunk=1)(tokens, tokens))
    # The recomputed chunk of a trained head is 16 rows, and the largest.
    assert max(t.numel() for t in kept) <= max(16 * VOCABULARY, tokens.numel() * 16) < logits


def test_frozen_head_gets_no_gradient_and_is_not_kept_for_backward(generator: torch.Generator) -> None:
    model = TinyCausalLM()
    tokens, labels = batch(generator)
    kept = kept_for_backward(lambda: CausalLoss(model)(tokens, labels))
    assert model.lm_head.weight.grad is None
    assert all(t.untyped_storage().data_ptr() != model.lm_head.weight.untyped_storage().data_ptr() for t in kept)


@pytest.mark.parametrize("trained_head", [False, True])
def test_batch_without_targets_has_loss_zero_and_zero_gradients_everywhere(trained_head: bool) -> None:
    model = TinyCausalLM()
    model.lm_head.requires_grad_(trained_head)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    loss = CausalLoss(model)(tokens, torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0
    # Data-parallel engines wait for the gradient of every trained parameter.
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_loss_needs_no_gradient_when_gradients_are_off(generator: torch.Generator) -> None:
    model = TinyCausalLM()
    tokens, labels = batch(generator)
    with torch.no_grad():
        loss = CausalLoss(model)(tokens, labels)
    torch.testing.assert_close(loss, naive_loss(model, tokens, labels).detach())


def test_second_derivative_is_refused_instead_of_wrong(generator: torch.Generator) -> None:
    model = TinyCausalLM()
    tokens, labels = batch(generator)
    weight = model.model.v_proj.weight
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(CausalLoss(model)(tokens, labels), weight, create_graph=True)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL)),
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.2)),
    ],
)
def test_loss_equals_that_of_the_transformers_model(
    architecture: type, config: object, generator: torch.Generator
) -> None:
    torch.manual_seed(0)
    model = architecture(config).eval().requires_grad_(False)
    # Large logits, so that the cap of 0.2 matters.
    model.lm_head.weight.mul_(50)
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 12), generator=generator)
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 9:] = 0
    labels = tokens.masked_fill(attention_mask == 0, -100)
    module = CausalLoss(model)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=attention_mask).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum")
        ours = module(tokens, labels, torch.arange(12).expand(2, 12), attention_mask)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    module.verify_head()


def test_packed_samples_do_not_see_each_other(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    module = CausalLoss(LlamaForCausalLM(LlamaConfig(**SMALL)).eval().requires_grad_(False))
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 12), generator=generator)
    positions = torch.tensor([[*range(5), *range(7)]])
    labels = tokens.clone()
    labels[:, :6] = -100
    changed = tokens.clone()
    changed[:, :5] = (changed[:, :5] + 1) % SMALL["vocab_size"]
    assert module(tokens, labels, positions) == module(changed, labels, positions)


def test_model_that_scales_its_logits_after_the_head_is_refused() -> None:
    torch.manual_seed(0)
    module = CausalLoss(CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)))
    with pytest.raises(ModelError, match="CohereForCausalLM: its logits are not head"):
        module.verify_head()
    assert module.training


def test_model_without_a_head_is_refused() -> None:
    model = TinyCausalLM()
    model.get_output_embeddings = lambda: None  # type: ignore[method-assign,assignment]
    with pytest.raises(ModelError, match="TinyCausalLM has no output embeddings"):
        CausalLoss(model)


def test_a_base_model_without_finite_logits_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(ModelError, match="logits of the base model are not finite"):
        CausalLoss(model).verify_head()
