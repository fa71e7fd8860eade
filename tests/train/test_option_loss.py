"""The loss of options from one shared prompt, against passes over every option alone."""

from __future__ import annotations

import pytest
import torch
from reference.options import choice_losses
from tiny_checkpoint import SIZES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qaft.data.files import Provenance
from qaft.data.options import OptionsSample
from qaft.data.options_batch import OptionsBatch, make_options_batch
from qaft.train.loss import CausalLoss
from qaft.train.option_loss import OptionsLoss

ROWS = {
    "one token each": [((5, 6, 7), ((1,), (2,), (3,)), 0), ((9,), ((1,), (2,), (3,)), 2)],
    "unequal lengths": [
        ((9, 4), ((1, 4), (2, 4, 5), (3,)), 1),
        ((40, 41, 42, 43, 44), ((8, 8, 8, 9), (17, 8), (18, 1)), 0),
    ],
    "a common beginning": [((5, 6), ((11, 12, 13), (11, 12, 14)), 1), ((7,), ((11, 12, 13, 1), (11, 12, 14)), 0)],
    "one the beginning of another": [((5, 6), ((11,), (11, 12)), 1), ((8, 5, 6), ((11,), (11, 12)), 0)],
    "trees beside plain rows": [((5, 6), ((11, 3), (11, 4)), 1), ((8, 5, 6), ((11, 2, 3), (12,)), 0)],
}


def samples(rows: str) -> list[OptionsSample]:
    return [OptionsSample(*row, Provenance("made up", i + 1)) for i, row in enumerate(ROWS[rows])]


def batch_of(chosen: list[OptionsSample], *, padding: int = 3) -> OptionsBatch:
    length = max(len(sample) for sample in chosen) + padding
    return make_options_batch([[sample] for sample in chosen], length, pad_id=0, num_targets=len(chosen), step=0)


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, initializer_range=0.3, attn_implementation=attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):  # those of transformers compute in fp32
            model.set_submodule(name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return model.double()


def gradients(model: LlamaForCausalLM, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


# Eager attention takes its softmax in fp32.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-9), ("eager", 1e-4)])
@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_gradient_are_those_of_every_option_alone(rows: str, attention: str, tolerance: float) -> None:
    model, chosen = llama(attention), samples(rows)
    # Chunks of sixteen places: what is predicted is divided among several.
    loss = OptionsLoss(CausalLoss(model, logits_per_chunk=1))
    value, expected = loss(**batch_of(chosen * 6).loss_inputs()), choice_losses(model, chosen).sum() * 6
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    for found, wanted in zip(gradients(model, value), gradients(model, expected), strict=True):
        assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("rows", ROWS)
def test_losses_by_group_are_those_of_the_rows(rows: str) -> None:
    model, chosen = llama(), samples(rows)
    batch = batch_of(chosen)
    with torch.inference_mode():
        found = OptionsLoss(CausalLoss(model))(**batch.loss_inputs(), groups=batch.examples())
        torch.testing.assert_close(found, choice_losses(model, chosen), rtol=1e-12, atol=0)
    assert found.dtype == torch.float64


def test_options_that_differ_in_their_last_token_are_read_from_the_end_of_a_plain_row() -> None:
    model = llama()
    chosen = [OptionsSample((5, 6, 7), ((11, 12, 13), (11, 12, 14), (11, 12, 15)), 0, Provenance("made up", 1))]
    batch = batch_of(chosen, padding=0)
    assert batch.branches is None
    assert batch.input_ids.tolist() == [[5, 6, 7, 11, 12]]
    heads: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: heads.append(len(args[0])))
    with torch.no_grad():
        OptionsLoss(CausalLoss(model))(**batch.loss_inputs())
    assert heads == [1]


def test_a_row_of_padding_adds_nothing() -> None:
    model, loss = llama(), OptionsLoss(CausalLoss(llama()))
    chosen = samples("unequal lengths")
    rows = [[sample] for sample in chosen]
    batch = make_options_batch([*rows, []], 24, pad_id=0, num_targets=2, step=0)
    torch.testing.assert_close(loss(**batch.loss_inputs()), choice_losses(model, chosen).sum(), rtol=1e-12, atol=0)
    assert batch.example_targets().tolist() == [1, 1, 0]
    empty = make_options_batch([[]], 8, pad_id=0, num_targets=2, step=0)
    value = loss(**empty.loss_inputs())
    value.backward()
    assert value.item() == 0
    assert all(bool((p.grad == 0).all()) for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("pad_id", [0, 11])
def test_no_token_of_the_padding_is_seen(pad_id: int) -> None:
    loss, rows = OptionsLoss(CausalLoss(llama())), [[sample] for sample in samples("a common beginning")]
    batches = [make_options_batch(rows, length, pad_id, num_targets=2, step=0) for length in (8, 16)]
    values = [loss(**batch.loss_inputs()) for batch in batches]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
