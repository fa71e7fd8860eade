"""The tokenizer in a GGUF file: named by what it does, complete, and refused where llama.cpp has none like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_checkpoint import byte_tokenizer
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from qaft.errors import ExportError
from qaft.export.gguf_tokenizer import add_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VALUES = gguf.GGUFValueType
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def written(tokenizer: Any, folder: Path, *, vocab_size: int = 264) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys of a file with nothing but this tokenizer, and the notes."""
    tokenizer.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    notes = add_tokenizer(writer, tokenizer, folder, vocab_size=vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    return {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}, notes


def split_by(*steps: Any, ignore_merges: bool = False) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


def plain() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(regex: str) -> Any:
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


RULES: dict[str, Any] = {
    "gpt-2": lambda: byte_tokenizer(),
    "smollm": lambda: split_by(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "llama-bpe": lambda: split_by(split(LLAMA3), plain(), ignore_merges=True),
    "dbrx": lambda: split_by(split(LLAMA3), plain()),
    "qwen2": lambda: split_by(split(LLAMA3.replace("{1,3}", "")), plain()),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_that_splits_text_is_named_by_what_it_does(tmp_path: Path, name: str) -> None:
    fields, notes = written(RULES[name](), tmp_path)
    assert (fields["ggml.model"], fields["ggml.pre"], notes) == ("gpt2", name, ())


@pytest.mark.parametrize(
    "steps", [(split(r"\p{L}+"), plain()), (pre_tokenizers.ByteLevel(add_prefix_space=True),), (plain(),)]
)
def test_an_unknown_rule_is_refused_with_its_steps(tmp_path: Path, steps: Any) -> None:
    with pytest.raises(ExportError, match=r"splits text by \[.*no name for.*gpt-2, smollm.*export `merged`"):
        written(split_by(*steps), tmp_path)


def test_vocabulary_merges_special_tokens_and_template_are_complete(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=True)
    fields, _ = written(tokenizer, tmp_path)
    ids = tokenizer.get_vocab()
    assert fields["ggml.tokens"][:262] == sorted(ids, key=lambda token: ids[token])
    assert fields["ggml.tokens"][262:] == ["[PAD262]", "[PAD263]"]
    assert fields["ggml.token_type"] == [1] * 258 + [3] * 4 + [5] * 2
    assert fields["ggml.merges"] == ["Ġ g", "Ċ Ċ"]
    assert fields["ggml.bos_token_id"] == ids["<s>"] and fields["ggml.eos_token_id"] == ids["<|im_end|>"]
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (True, False)
    assert fields["chat_template"] == tokenizer.chat_template


def test_a_tokenizer_that_adds_nothing_says_so(tmp_path: Path) -> None:
    fields, _ = written(byte_tokenizer(), tmp_path)
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (False, False)


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    vocab = {token: index for token, index in tokenizer.get_vocab().items() if len(token) == 1}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[])
    with pytest.raises(ExportError, match=r"has no merges, without which llama\.cpp loads no BPE"):
        written(tokenizer, tmp_path)


def test_a_tokenizer_that_is_no_bpe_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.model = models.WordLevel(vocab={"a": 0}, unk_token="a")
    with pytest.raises(ExportError, match="a tokenizer of type WordLevel: gguf is written for BPE only"):
        written(tokenizer, tmp_path)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="token of id 261, but the embedding has 260 rows"):
        written(byte_tokenizer(), tmp_path, vocab_size=260)


def test_a_normalization_that_llama_cpp_leaves_out_is_noted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "does not normalize text (NFC)" in written(tokenizer, tmp_path)[1][0]


def test_scores_of_a_sentencepiece_vocabulary_order_its_merges(stories260k: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    fields, notes = written(tokenizer, tmp_path, vocab_size=512)
    assert (fields["ggml.model"], fields["ggml.add_space_prefix"], notes) == ("llama", True, ())
    tokens, scores, kinds = (fields[f"ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert kinds[:3] == [2, 3, 3] and tokens[3] == "<0x00>" and kinds[3] == 6
    assert "ggml.merges" not in fields
    again = AutoTokenizer.from_pretrained(_alone(tmp_path), gguf_file="model.gguf")
    text = 'Once upon a time, there was a little girl named Lily.\nShe said "Hi!" 3 times é'
    assert again(text).input_ids == tokenizer(text).input_ids
    assert sorted(scores) != scores and len(set(scores)) > 100


def _alone(folder: Path) -> Path:
    """The file without tokenizer files beside it, which transformers would read instead."""
    (folder / "alone").mkdir()
    (folder / "model.gguf").rename(folder / "alone" / "model.gguf")
    return folder / "alone"
