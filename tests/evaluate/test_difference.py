"""Differences of logits: closed forms, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_lm import LetterTokenizer, tiny_llama

from qaft.errors import DataError, ModelError
from qaft.evaluate.difference import (
    MAX_PROMPT_TOKENS,
    PromptLogits,
    compare_logits,
    difference_table,
    logits_of,
    prompt_ids,
    read_prompts,
)


def random_logits(generator: torch.Generator) -> PromptLogits:
    ids = tuple(torch.randint(0, 7, (n,), generator=generator) for n in (3, 5))
    return PromptLogits(ids, tuple(torch.randn(len(i), 7, generator=generator) for i in ids))


def test_a_model_does_not_differ_from_itself(generator: torch.Generator) -> None:
    a = random_logits(generator)
    found = compare_logits(a, a)
    assert (found.max_abs, found.rms, found.max_relative, found.kl_mean, found.top1_agreement) == (0, 0, 0, 0, 1)
    assert found.perplexity_a == found.perplexity_b and found.num_tokens == 8


def test_measures_equal_their_definitions(generator: torch.Generator) -> None:
    a = random_logits(generator)
    b = PromptLogits(a.ids, tuple(x + 0.3 * torch.randn(x.shape, generator=generator) for x in a.logits))
    found = compare_logits(a, b)
    x, y = torch.cat(a.logits).double(), torch.cat(b.logits).double()
    p, q = x.softmax(-1), y.softmax(-1)
    assert found.max_abs == pytest.approx(float((x - y).abs().max()))
    assert found.rms == pytest.approx(float((x - y).square().mean().sqrt()))
    assert found.max_relative == pytest.approx(float(((x - y).abs().amax(-1) / x.abs().amax(-1)).max()))
    assert found.kl_mean == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert found.top1_agreement == pytest.approx(float((x.argmax(-1) == y.argmax(-1)).double().mean()))
    losses = [
        torch.nn.functional.cross_entropy(z[:-1].double(), i[1:], reduction="sum")
        for i, z in zip(b.ids, b.logits, strict=True)
    ]
    assert found.perplexity_b == pytest.approx(math.exp(float(sum(losses)) / 6))


def test_kl_of_two_known_distributions() -> None:
    ids = (torch.tensor([0, 1]),)
    a = PromptLogits(ids, (torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(),))
    b = PromptLogits(ids, (torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(),))
    assert compare_logits(a, b).kl_mean == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)


def test_masked_logits_of_minus_infinity_contribute_nothing() -> None:
    a = PromptLogits((torch.tensor([0, 1]),), (torch.tensor([[1.0, 2.0, -math.inf], [0.0, 1.0, -math.inf]]),))
    found = compare_logits(a, PromptLogits(a.ids, (a.logits[0].clone(),)))
    assert found.kl_mean == 0


def test_models_with_other_vocabularies_cannot_be_compared(generator: torch.Generator) -> None:
    a = random_logits(generator)
    with pytest.raises(ModelError, match="vocabularies differ"):
        compare_logits(a, PromptLogits(a.ids, tuple(x[:, :6] for x in a.logits)))
    with pytest.raises(ModelError, match="prompts"):
        compare_logits(a, PromptLogits(a.ids[:1], a.logits[:1]))


def test_a_live_model_and_its_saved_folder_have_equal_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(torch.bfloat16)
    ids = [torch.tensor([3, 1, 4])]
    monkeypatch.setattr("qaft.evaluate.difference.load_plain", lambda name, device: (tiny_llama(torch.bfloat16), None))
    found = compare_logits(logits_of(model, ids), logits_of(tmp_path, ids))
    assert found.max_abs == 0


def test_a_token_outside_of_the_vocabulary_is_an_error_not_a_crash() -> None:
    with pytest.raises(ModelError, match="token 96 is outside of the vocabulary of 96"):
        logits_of(tiny_llama(), [torch.tensor([1, 96])])


def test_prompts_are_cut_and_those_of_one_token_left_out() -> None:
    found = prompt_ids(LetterTokenizer(), ["A", "AB", "x" * 1000])
    assert [len(ids) for ids in found] == [2, MAX_PROMPT_TOKENS]
    with pytest.raises(DataError, match="none of the 1 prompts"):
        prompt_ids(LetterTokenizer(), ["A"])


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first\n\n  \nsecond line\n")
    assert read_prompts(tmp_path / "p.txt") == ("first", "second line")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


def test_the_table_shows_every_measure(generator: torch.Generator) -> None:
    a = random_logits(generator)
    table = difference_table(compare_logits(a, a), a="base", b="export")
    assert table.title == "export against base, 8 tokens" and table.row_count == 7
