from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from tokenizers import normalizers

from qaft.data.files import Provenance
from qaft.data.items import classification_items
from qaft.data.loaders import eval_batches, train_batches
from qaft.data.options import OptionsSample, load_options
from qaft.data.options_batch import PADDING, OptionsBatch, make_options_batch
from qaft.data.report import data_report, print_report
from qaft.data.samples import IGNORE_INDEX
from qaft.errors import DataError
from qaft.sections import DataSection, TrainSection

ROWS = [{"sentence": "good one", "label": 1}, {"sentence": "bad", "label": 0}, {"sentence": "so so", "label": 0}]
MADE_UP = Provenance("made up", 7)


def section(path: Path, verbalizers: dict[int, str] | None = None, **options: Any) -> DataSection:
    given = {"prompt": "{sentence} It was", "verbalizers": verbalizers or {0: " bad", 1: " good"}, "loss": "options"}
    files = {"train": str(path), "valid": str(path), "packing": False}
    return DataSection.model_validate({**files, "classification": given, **options})


def test_samples_are_the_items_that_evaluation_scores(chatml: Any, write_rows: Callable[..., Path]) -> None:
    data = section(write_rows(ROWS))
    loaded = load_options(data, chatml, "train")
    for sample, item in zip(loaded.samples, classification_items(data, chatml, "train"), strict=True):
        assert (sample.prompt_ids, sample.option_ids, sample.label, sample.source) == (
            item.prompt_ids,
            item.option_ids,
            item.label,
            item.source,
        )
    assert loaded.lengths.tolist() == [len(sample) for sample in loaded.samples]


def test_a_row_is_the_stem_and_every_ending_without_its_last_token() -> None:
    sample = OptionsSample((5, 6), ((11, 1), (11, 2, 3, 4), (11, 8, 9)), 2, MADE_UP)
    assert (sample.stem, sample.endings) == ((5, 6, 11), ((1,), (2, 3, 4), (8, 9)))
    assert len(sample) == 6
    batch = make_options_batch([[sample]], 8, pad_id=99, num_targets=1, step=0)
    assert batch.input_ids.tolist() == [[5, 6, 11, 2, 3, 8, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 6, 7]]
    assert batch.branches is not None
    assert batch.branches.tolist() == [[0, 0, 0, 2, 2, 3, PADDING, PADDING]]
    assert batch.places.tolist() == [[2, 3, 4, 5]]
    nothing = IGNORE_INDEX
    assert batch.tokens[0].tolist() == [[1, 2, 8], [nothing, 3, nothing], [nothing, 4, nothing], [nothing, nothing, 9]]
    assert (batch.chosen.tolist(), batch.num_tokens) == ([2], 6)


@pytest.mark.parametrize(
    ("prompt", "options", "label", "message"),
    [
        ((), ((1,), (2,)), 0, "the prompt has no token"),
        ((5,), ((1,),), 0, "at least two"),
        ((5,), ((1,), (2,)), 2, "option 2 of 2 is no choice"),
        ((5,), ((1,), ()), 0, "option 1 has no token"),
        ((5,), ((1, 2), (3,), (1, 2)), 0, r"options 0 and 2 are the same tokens \[1, 2\]"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_place(prompt: Any, options: Any, label: int, message: str) -> None:
    with pytest.raises(DataError, match=rf"made up, line 7: data.classification.loss=options: .*{message}"):
        OptionsSample(prompt, options, label, MADE_UP)


@pytest.mark.parametrize("verbalizers", [{0: " bad"}, {0: " bad", 1: ""}, {0: " bad", 1: " bad"}])
def test_verbalizers_that_are_no_choice_are_refused_when_the_recipe_is_read(
    tmp_path: Path, verbalizers: dict[int, str]
) -> None:
    with pytest.raises(ValidationError, match="at least two classes to texts that differ and are not empty"):
        section(tmp_path, verbalizers)


def test_a_verbalizer_that_is_no_token_is_named(
    make_tokenizer: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" bad", "")
    with pytest.raises(DataError, match=r"line 1: .* option 0 has no token"):
        load_options(section(write_rows(ROWS)), tokenizer, "train")


def test_a_row_that_is_too_long_is_refused_or_dropped_and_never_cut(
    chatml: Any, write_rows: Callable[..., Path]
) -> None:
    path = write_rows(ROWS)
    length = len(load_options(section(path), chatml, "train").samples[0])
    with pytest.raises(DataError, match=rf"line 1: {length} tokens of the prompt and its 2 options do not fit"):
        load_options(section(path, max_length=length - 1), chatml, "train")
    loaded = load_options(section(path, max_length=length - 1, on_long="drop"), chatml, "train")
    assert (len(loaded.samples), loaded.dropped, len(loaded.lengths)) == (2, 1, 3)
    with pytest.raises(DataError, match=r"no row is left \(3 are longer than data.max_length=8\)"):
        load_options(section(path, max_length=8, on_long="drop"), chatml, "train")


def test_every_row_is_one_target_in_training_and_evaluation(chatml: Any, write_rows: Callable[..., Path]) -> None:
    data = section(write_rows(ROWS * 3))
    train = TrainSection(steps=2, batch_size=4, grad_accumulation=2)
    batches = list(train_batches(data, train, chatml).from_step(0))
    assert [batch.num_targets for batch in batches] == [8] * 4
    evaluation = eval_batches(data, train, chatml, rank=1, world_size=4)
    assert evaluation is not None
    last = list(evaluation)[-1]
    assert isinstance(last, OptionsBatch)
    assert (last.num_targets, last.example_targets().tolist(), last.num_tokens) == (1, [0], 0)


def test_evaluation_stops_after_the_batches_that_were_asked_for(chatml: Any, write_rows: Callable[..., Path]) -> None:
    data = section(write_rows(ROWS * 3))
    limited = eval_batches(data, TrainSection(batch_size=2, eval_batches=3), chatml)
    assert limited is not None
    assert [batch.num_targets for batch in limited] == [2, 2, 2]


def test_the_report_shows_every_option_and_marks_the_right_one(chatml: Any, write_rows: Callable[..., Path]) -> None:
    data = section(write_rows([ROWS[0], ROWS[0], ROWS[1]]))
    report, stream = data_report(data, TrainSection(), chatml, num_excerpts=1), StringIO()
    print_report(report, Console(file=stream, width=200))
    text = stream.getvalue()
    assert "good one It was\n   1  bad\n   2 [[ good]]" in text
    assert "(right option in [[ ]])" in text
    assert "one choice between options in each sample" in text
    assert "3 rows: 2 options scored after one prompt, side by side in one row" in text
    assert (report.num_samples, report.duplicates, report.overlap) == (3, 1, 3)
