"""What an export records of its answers: closed forms, and that it sees what the whole logits would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qaft.errors import ExportError
from qaft.evaluate.difference import PromptLogits, compare_logits
from qaft.export.fingerprint import TOP, Fingerprint

IDS = (torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6]))


def answers(vocabulary: int = 200, noise: float = 0.0) -> PromptLogits:
    generator = torch.Generator().manual_seed(0)
    logits = [4 * torch.randn(len(ids), vocabulary, generator=generator) for ids in IDS]
    return PromptLogits(IDS, tuple(x + noise * torch.randn(x.shape, generator=generator) for x in logits))


def test_a_model_does_not_deviate_from_its_own_fingerprint(tmp_path: Path) -> None:
    Fingerprint.of(answers(), device="cpu").save(tmp_path / "f.json")
    deviation = Fingerprint.load(tmp_path / "f.json").compare(answers())
    assert (deviation.max_relative, deviation.top1_agreement, deviation.num_tokens) == (0.0, 1.0, 8)
    assert deviation.kl_mean == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_its_divergence_is_at_most_that_of_all_logits_and_near_it(noise: float) -> None:
    whole = compare_logits(answers(), answers(noise=noise))
    seen = Fingerprint.of(answers(), device="cpu").compare(answers(noise=noise))
    assert 0.3 * whole.kl_mean < seen.kl_mean <= whole.kl_mean
    assert 0 < seen.max_relative <= whole.max_relative
    assert seen.top1_agreement == whole.top1_agreement


def test_a_vocabulary_of_fewer_tokens_than_are_kept_is_kept_whole() -> None:
    small = answers(vocabulary=TOP - 6)
    whole = compare_logits(small, answers(vocabulary=TOP - 6, noise=0.1))
    seen = Fingerprint.of(small, device="cpu").compare(answers(vocabulary=TOP - 6, noise=0.1))
    assert seen.kl_mean == pytest.approx(whole.kl_mean, rel=1e-5)
    assert seen.max_relative == pytest.approx(whole.max_relative, rel=1e-5)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ExportError, match="vocabulary is smaller"):
        Fingerprint.of(answers(), device="cpu").compare(answers(vocabulary=20))


@pytest.mark.parametrize(
    "content", [None, "{", '{"ids": []}', '{"ids": [["a"]], "top": [], "logits": [], "total": []}']
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "f.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ExportError, match=r"f\.json: is no record"):
        Fingerprint.load(path)
