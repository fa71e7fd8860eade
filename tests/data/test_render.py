from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qaft.data.examples import Completion, Conversation, Example, Text, Turn
from qaft.data.files import Provenance
from qaft.data.layouts import choose_layout
from qaft.data.render import Renderer
from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.errors import DataError

WHERE = Provenance("a.jsonl", 7)
CHAT = Conversation((Turn("user", "q"), Turn("assistant", "abc"), Turn("user", "r"), Turn("assistant", "")), WHERE)


def renderer(tokenizer: Any, name: str = "messages", mode: str = "auto", **options: Any) -> Renderer:
    return Renderer(tokenizer, choose_layout(mode, name, tokenizer), **{"max_length": 64, **options})


def trained_text(tokenizer: Any, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX].tolist())


def test_labels_are_the_tokens_themselves_where_they_are_trained(chatml: Any) -> None:
    (sample,) = renderer(chatml, max_length=128).render([CHAT])
    kept = sample.labels != IGNORE_INDEX
    assert (sample.labels[kept] == sample.input_ids[kept]).all()
    assert trained_text(chatml, sample) == "abc<|im_end|>\n<|im_end|>\n"
    assert sample.source == WHERE
    assert not sample.truncated


@pytest.mark.parametrize(
    ("example", "name", "text"),
    [
        (Completion("p", " great", WHERE), "prompt_completion", " great<|im_end|>"),
        (Completion("p", "", WHERE), "prompt_completion", "<|im_end|>"),
        (Completion("p", "done<|im_end|>", WHERE), "prompt_completion", "done<|im_end|>"),
        (Text("abc", WHERE), "text", "abc<|im_end|>"),
        (CHAT, "messages", "abc<|im_end|><|im_end|>"),
    ],
)
def test_a_plain_layout_trains_one_eos_after_each_answer(plain: Any, example: Example, name: str, text: str) -> None:
    (sample,) = renderer(plain, name, max_length=128).render([example])
    assert trained_text(plain, sample) == text
    assert sample.input_ids.tolist().count(plain.bos_token_id) == 1
    assert sample.input_ids[0] == plain.bos_token_id


def test_bos_is_not_doubled_by_a_template_that_writes_it(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = make_tokenizer(template, bos=True)
    (sample,) = renderer(tokenizer).render([Conversation(CHAT.turns[:2], WHERE)])
    assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_train_on_all_trains_every_token_but_the_first(chatml: Any) -> None:
    (sample,) = renderer(chatml, max_length=128, train_on="all").render([CHAT])
    assert sample.labels.tolist() == [IGNORE_INDEX, *sample.input_ids.tolist()[1:]]
    assert sample.num_targets == len(sample) - 1


def test_a_conversation_without_an_answer_is_an_error_for_completions_and_a_sample_for_all(chatml: Any) -> None:
    example = Conversation((Turn("user", "q"),), WHERE)
    with pytest.raises(DataError, match=r"line 7: no token carries loss.*add an assistant turn"):
        renderer(chatml).render([example])
    (sample,) = renderer(chatml, train_on="all").render([example])
    assert sample.num_targets == len(sample) - 1


def test_an_answer_without_an_end_token_is_an_error(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match=r"line 7: no end token is trained, the model would never stop.*abc"):
        renderer(make_tokenizer(template)).render([Conversation(CHAT.turns[:2], WHERE)])


def test_a_special_token_in_the_middle_of_an_answer_does_not_end_it(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="no end token is trained"):
        renderer(make_tokenizer(template)).render([Conversation(CHAT.turns[:2], WHERE)])


def test_an_end_token_that_is_not_eos_counts_and_is_remembered(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    rendering = renderer(tokenizer, max_length=128)
    rendering.render([CHAT])
    assert dict(rendering.ends) == {tokenizer.convert_tokens_to_ids("<|im_end|>"): 1}


def test_a_sample_that_is_cut_is_marked_and_counted(chatml: Any) -> None:
    rendering = renderer(chatml, max_length=22)
    (sample,) = rendering.render([CHAT])
    assert (len(sample), sample.truncated, rendering.counts["truncated"]) == (22, True, 1)
    assert trained_text(chatml, sample) == "ab"
    (whole,) = renderer(chatml, max_length=128).render([CHAT])
    assert rendering.lengths == [len(whole)]


def test_the_cut_is_at_max_length_and_not_one_token_earlier(plain: Any) -> None:
    whole = renderer(plain, "text", max_length=11).render([Text("012345678", WHERE)])
    assert (len(whole[0]), whole[0].truncated) == (11, False)
    cut = renderer(plain, "text", max_length=10).render([Text("012345678", WHERE)])
    assert (len(cut[0]), cut[0].truncated) == (10, True)


@pytest.mark.parametrize("on_long", ["truncate", "error"])
def test_a_prompt_that_fills_the_window_is_an_error(plain: Any, on_long: str) -> None:
    with pytest.raises(DataError, match=r"line 7: 103 tokens do not fit into data.max_length=64"):
        renderer(plain, "prompt_completion", on_long=on_long).render([Completion("p" * 100, "c", WHERE)])


def test_dropping_counts_what_is_too_long_and_keeps_the_rest(plain: Any) -> None:
    rendering = renderer(plain, "prompt_completion", on_long="drop")
    samples = rendering.render([Completion("p" * n, "c", WHERE) for n in (100, 1, 62, 61)])
    assert [len(sample) for sample in samples] == [4, 64]
    assert rendering.counts["dropped"] == 2
    assert rendering.lengths == [103, 4, 65, 64]


@pytest.mark.parametrize("length", [1, 8, 9, 62, 200_000])
def test_the_windows_of_a_split_text_train_every_token_once(plain: Any, length: int) -> None:
    samples = renderer(plain, "text", on_long="split", max_length=9).render([Text("ab" * length, WHERE)])
    targets = [label for sample in samples for label in sample.labels.tolist() if label != IGNORE_INDEX]
    assert targets == [*plain("ab" * length)["input_ids"][1:], plain.eos_token_id]
    assert all(2 <= len(sample) <= 9 for sample in samples)


def test_empty_texts_are_skipped_and_counted(plain: Any) -> None:
    rendering = renderer(plain, "text")
    assert len(rendering.render([Text("", WHERE), Text(" \n", WHERE), Text("a", WHERE)])) == 1
    assert rendering.counts["empty"] == 2


def test_an_empty_row_is_an_error(plain: Any) -> None:
    with pytest.raises(DataError, match="line 7: prompt and completion are both empty"):
        renderer(plain, "prompt_completion").render([Completion("", "", WHERE)])


def test_the_first_token_of_a_sample_is_never_a_target() -> None:
    sample = Sample([5, 6], [5, 6], WHERE)  # pyright: ignore[reportArgumentType]
    assert sample.labels.tolist() == [IGNORE_INDEX, 6]
    assert sample.num_targets == 1


@pytest.mark.parametrize(("ids", "labels"), [([1, 2], [1]), ([], [])])
def test_a_sample_needs_as_many_labels_as_tokens_and_at_least_one(ids: list[int], labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl, line 7"):
        Sample(ids, labels, WHERE)  # pyright: ignore[reportArgumentType]
