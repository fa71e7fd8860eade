from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qaft.data.items import classification_items, generation_items
from qaft.data.load import load_samples
from qaft.data.samples import IGNORE_INDEX
from qaft.errors import DataError, RecipeError
from qaft.sections import DataSection

CLASSES = {"prompt": "{sentence} It was", "verbalizers": {0: " terrible", 1: " great"}}
ROWS = [{"sentence": "good one", "label": 1}, {"sentence": "bad one", "label": 0}]


def section(path: Path, **options: Any) -> DataSection:
    return DataSection.model_validate({"train": str(path), "valid": str(path), **options})


@pytest.mark.parametrize("mode", ["auto", "tokenizer"])
def test_the_right_option_after_its_prompt_is_the_training_sample_without_its_end(
    chatml: Any, write_rows: Callable[..., Path], mode: str
) -> None:
    data = section(write_rows(ROWS), classification=CLASSES, chat_template=mode)
    items = classification_items(data, chatml)
    samples = load_samples(data, chatml, "train").samples
    assert [item.label for item in items] == [1, 0]
    for item, sample in zip(items, samples, strict=True):
        option = item.option_ids[item.label]
        both = [*item.prompt_ids, *option]
        assert sample.input_ids[: len(both)].tolist() == both
        assert sample.input_ids[len(both)] == chatml.eos_token_id
        assert (sample.labels[: len(item.prompt_ids)] == IGNORE_INDEX).all()
        assert sample.labels[len(item.prompt_ids)] == option[0]
        assert item.source == sample.source
    assert [chatml.decode(list(option)) for option in items[0].option_ids] == [" terrible", " great"]


def test_columns_are_renamed_for_classification_too(chatml: Any, write_rows: Callable[..., Path]) -> None:
    rows = [{"s": row["sentence"], "y": row["label"]} for row in ROWS]
    data = section(write_rows(rows), classification=CLASSES, columns={"sentence": "s", "label": "y"})
    assert [item.label for item in classification_items(data, chatml)] == [1, 0]


def test_items_need_the_classification_section(chatml: Any, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"data\.classification is not set"):
        classification_items(section(write_rows(ROWS)), chatml)


def test_a_generation_prompt_begins_the_training_sample_up_to_the_first_trained_token(
    chatml: Any, write_rows: Callable[..., Path]
) -> None:
    rows = [{"instruction": f"i{n}", "input": "", "output": f"o {n}"} for n in range(3)]
    data = section(write_rows(rows))
    samples = load_samples(data, chatml, "train").samples
    items = generation_items(data, chatml)
    assert [item.reference for item in items] == ["o 0", "o 1", "o 2"]
    for item, sample in zip(items, samples, strict=True):
        first = int((sample.labels != IGNORE_INDEX).argmax())
        assert list(item.prompt_ids) == sample.input_ids[:first].tolist()


def test_a_plain_generation_prompt_begins_with_one_bos(plain: Any, write_rows: Callable[..., Path]) -> None:
    (item,) = generation_items(section(write_rows([{"prompt": "ab", "completion": " c"}])), plain)
    assert list(item.prompt_ids) == plain("ab")["input_ids"]
    assert item.reference == " c"


def test_text_has_no_generation_items(plain: Any, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="line 1: the format text has no prompt"):
        generation_items(section(write_rows([{"text": "abc"}])), plain)


def test_real_reviews_become_items_with_the_published_balance(stories260k: Path, shared_data: Path) -> None:
    data = section(shared_data / "mr" / "valid.jsonl", classification=CLASSES, limit=800)
    items = classification_items(data, AutoTokenizer.from_pretrained(stories260k))
    assert (len(items), sum(item.label for item in items)) == (800, 407)
