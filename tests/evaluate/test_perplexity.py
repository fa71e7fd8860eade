"""Perplexity: the sum over labels of transformers' own loss, whatever the blocks, batches and chunks."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_lm import tiny_llama
from torch import Tensor

from qaft.data.files import Provenance
from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.errors import DataError, ModelError
from qaft.evaluate import head
from qaft.evaluate.perplexity import samples_perplexity, text_perplexity


@pytest.fixture
def text(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 96, (70,), generator=generator)


def reference_nll(ids: Tensor, labels: Tensor) -> float:
    logits = tiny_llama()(ids[None]).logits[0].detach().double()
    return float(
        torch.nn.functional.cross_entropy(logits[:-1], labels[1:].long(), ignore_index=IGNORE_INDEX, reduction="sum")
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_disjoint_blocks_score_all_but_the_first_token_of_each(text: Tensor, batch_size: int) -> None:
    found = text_perplexity(tiny_llama(), text, max_length=16, batch_size=batch_size)
    blocks = text.split(16)
    assert found.tokens == 70 - len(blocks)
    assert found.nll == pytest.approx(sum(reference_nll(b, b) for b in blocks), rel=1e-6)
    assert found.value == pytest.approx(math.exp(found.nll / found.tokens))


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_overlapping_blocks_score_every_token_but_the_first_once(text: Tensor, stride: int) -> None:
    found = text_perplexity(tiny_llama(), text, max_length=16, stride=stride)
    assert found.tokens == 69
    expected, position = reference_nll(text[:16], text[:16]), 16
    while position < 70:
        end = min(position + stride, 70)
        begin = position + stride - 16
        labels = text[begin:end].clone()
        labels[: position - begin] = IGNORE_INDEX
        expected, position = expected + reference_nll(text[begin:end], labels), end
    assert found.nll == pytest.approx(expected, rel=1e-6)


def test_a_short_text_is_one_block(text: Tensor) -> None:
    assert text_perplexity(tiny_llama(), text[:5], max_length=64).nll == pytest.approx(
        reference_nll(text[:5], text[:5]), rel=1e-6
    )


def sample(ids: Tensor, masked: int) -> Sample:
    labels = ids.clone()
    labels[:masked] = IGNORE_INDEX
    return Sample(ids.numpy(), labels.numpy(), Provenance("memory", 1))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_samples_count_their_labels_only_and_padding_changes_nothing(text: Tensor, batch_size: int) -> None:
    samples = [sample(text[:9], 4), sample(text[9:30], 1), sample(text[30:33], 2), sample(text[40:70], 20)]
    found = samples_perplexity(tiny_llama(), samples, max_length=25, batch_size=batch_size)
    pairs = [(torch.tensor(s.input_ids[:25]).long(), torch.tensor(s.labels[:25])) for s in samples]
    assert found.tokens == sum(int((labels != IGNORE_INDEX).sum()) for _, labels in pairs)
    assert found.nll == pytest.approx(sum(reference_nll(*pair) for pair in pairs), rel=1e-6)


def test_logits_are_never_held_for_more_than_a_chunk(text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_perplexity(tiny_llama(), text, max_length=70).nll
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 5 * 96)
    model, seen = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    found = text_perplexity(model, text, max_length=70)
    # The check of the head looks at the logits of eight tokens.
    assert max(seen) <= 8 * 96 and seen.count(5 * 96) == 69 // 5
    assert found.nll == pytest.approx(expected, rel=1e-6)


def test_the_training_mode_is_restored(text: Tensor) -> None:
    model = tiny_llama().train()
    text_perplexity(model, text, max_length=32)
    assert model.training


def test_nothing_to_score_is_an_error(text: Tensor) -> None:
    with pytest.raises(DataError, match="1 tokens"):
        text_perplexity(tiny_llama(), text[:1], max_length=8)
    with pytest.raises(DataError, match="no token carries loss"):
        samples_perplexity(tiny_llama(), [sample(text[:4], 4)], max_length=8)
    with pytest.raises(ValueError, match="stride=9"):
        text_perplexity(tiny_llama(), text, max_length=8, stride=9)


def test_a_model_that_scales_its_logits_is_refused(text: Tensor) -> None:
    class Scaled(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    model = tiny_llama()
    model.__class__ = Scaled
    with pytest.raises(ModelError, match="logit scaling"):
        text_perplexity(model, text, max_length=32)
