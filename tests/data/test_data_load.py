from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from qaft.data.load import CHUNK_ROWS, load_samples
from qaft.data.samples import IGNORE_INDEX
from qaft.errors import DataError, RecipeError
from qaft.sections import DataSection

PAIR = {"prompt": "p", "completion": " c"}


def section(path: Path, **options: Any) -> DataSection:
    return DataSection.model_validate({"train": str(path), **options})


def test_samples_are_in_file_order_with_their_lines_across_chunks(plain: Any, write_rows: Callable[..., Path]) -> None:
    count = CHUNK_ROWS + 3
    loaded = load_samples(section(write_rows([{**PAIR, "prompt": str(i)} for i in range(count)])), plain, "train")
    assert [sample.source.number for sample in loaded.samples] == list(range(1, count + 1))
    prompts = [plain.decode(s.input_ids[1:-3].tolist()) for s in loaded.samples]
    assert prompts == [str(i) for i in range(count)]
    assert {sample.input_ids.dtype for sample in loaded.samples} == {np.dtype(np.int32)}


def test_the_format_and_layout_are_told(plain: Any, chatml: Any, write_rows: Callable[..., Path]) -> None:
    data = section(write_rows([{"instruction": "i", "output": "o", "id": 3}]))
    loaded = load_samples(data, plain, "train")
    assert loaded.format == "instruction"
    assert loaded.notes == (
        "format instruction (detected); fields: instruction, output, id",
        "fields not used: id",
        "layout: plain turns (### User:), because the tokenizer has no chat template",
    )
    assert load_samples(data, chatml, "train").notes[-1] == "layout: chat template of the tokenizer"


@pytest.mark.parametrize(
    ("rows", "options", "note"),
    [
        ([{**PAIR, "completion": "c" * 30}], {}, "1 samples were cut at max_length"),
        ([PAIR, {**PAIR, "completion": "c" * 30}], {"on_long": "drop"}, "1 samples above max_length were dropped"),
        ([{"text": "a" * 40}], {"on_long": "split"}, "1 texts above max_length were split"),
        ([{"text": "a"}, {"text": ""}], {}, "1 empty texts were skipped"),
        ([{"prompt": "It was ", "completion": "good"}], {}, "1 prompts end inside a token"),
    ],
)
def test_every_change_of_the_data_is_told(
    plain: Any, write_rows: Callable[..., Path], rows: list[dict[str, str]], options: dict[str, str], note: str
) -> None:
    loaded = load_samples(section(write_rows(rows), max_length=16, **options), plain, "train")
    assert any(line.startswith(note) for line in loaded.notes)


def test_an_end_token_other_than_eos_is_told(
    make_tokenizer: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    data = section(write_rows([{"instruction": "i", "output": "o"}]))
    notes = load_samples(data, make_tokenizer(eos="<|endoftext|>"), "train").notes
    assert "answers end with '<|im_end|>', not with EOS '<|endoftext|>': generation has to stop at it too" in notes


def test_counts_and_lengths_are_those_before_and_after_the_limit(plain: Any, write_rows: Callable[..., Path]) -> None:
    rows = [{**PAIR, "completion": "c" * n} for n in (1, 20, 30)]
    cut = load_samples(section(write_rows(rows), max_length=12), plain, "train")
    assert (cut.truncated, cut.dropped, cut.lengths.tolist()) == (2, 0, [4, 23, 33])
    assert [len(sample) for sample in cut.samples] == [4, 12, 12]
    kept = load_samples(section(write_rows(rows), max_length=12, on_long="drop"), plain, "train")
    assert (kept.truncated, kept.dropped, len(kept.samples)) == (0, 2, 1)


def test_a_bad_row_in_a_later_line_is_named(plain: Any, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: no field 'completion', found the fields prompt"):
        load_samples(section(write_rows([PAIR, PAIR, {"prompt": "p"}])), plain, "train")


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([{**PAIR, "completion": "c" * 30}], {"on_long": "drop"}, DataError, "no sample is left .1 are longer"),
        ([{"text": " "}], {}, DataError, "no sample is left .*1 are empty"),
        ([PAIR], {"on_long": "split"}, RecipeError, "data.on_long=split is for the format text"),
    ],
)
def test_data_that_leaves_nothing_or_contradicts_its_settings_is_refused(
    plain: Any, write_rows: Callable[..., Path], rows: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_samples(section(write_rows(rows), max_length=16, **options), plain, "train")


def test_a_data_set_that_is_not_named_is_a_recipe_error(plain: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.valid is not set"):
        load_samples(DataSection(), plain, "valid")


def test_real_instructions_train_their_outputs_and_one_end_each(stories260k: Path, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    data = section(shared_data / "dolly" / "valid.jsonl", max_length=8192)
    loaded = load_samples(data, tokenizer, "train")
    assert (len(loaded.samples), loaded.truncated, loaded.format) == (300, 0, "instruction")
    for sample in loaded.samples:
        trained = sample.input_ids[sample.labels != IGNORE_INDEX]
        assert trained.tolist().count(tokenizer.eos_token_id) == 1
        assert trained[-1] == tokenizer.eos_token_id
