"""The tokenizer of a GGUF file: llama.cpp knows a few algorithms by name, and takes the vocabulary from the file.

gpt2     byte-level BPE: merges in their order, and the name of the rule by which text is split before
llama    BPE on characters with bytes to fall back on (SentencePiece): of two neighbours the pair is merged whose
         result has the highest score; minus the rank of a merge as the score gives the same order
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from qaft.errors import ExportError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD_START = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_SPLITTERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("ByteLevel regex",), False): "gpt-2",
    (("Digits", "ByteLevel regex"), False): "smollm",
    ((f"Split {_LLAMA3}", "ByteLevel"), True): "llama-bpe",
    ((f"Split {_LLAMA3}", "ByteLevel"), False): "dbrx",
    ((f"Split {_QWEN2}", "ByteLevel"), False): "qwen2",
}
"""(Steps before the merges, whether words of the vocabulary skip them) -> llama.cpp's name of the rule."""


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, folder: Path, *, vocab_size: int) -> tuple[str, ...]:
    """Write vocabulary, merges or scores, special tokens and chat template; return what the user has to know.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer of transformers.
        folder: holds its files, and the model's config.
        vocab_size: rows of the embedding; ids without a token are filled up.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(f"a tokenizer of type {model['type']}: gguf is written for BPE only; export `merged`")
    if not model["merges"]:
        raise ExportError("the tokenizer has no merges, without which llama.cpp loads no BPE; export `merged`")
    sentencepiece = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _splitter(spec))
    tokens, types = _vocabulary(tokenizer, spec, vocab_size)
    writer.add_token_list(tokens)
    if sentencepiece:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_starts_with_space(spec))
    writer.add_token_types(types)
    _add_special(writer, tokenizer, folder, vocab_size, merges=not sentencepiece)
    return _notes(spec, sentencepiece)


def _splitter(spec: dict[str, Any]) -> str:
    steps = tuple(_step(part) for part in _parts(spec["pre_tokenizer"], "pretokenizers"))
    key = (steps, bool(spec["model"].get("ignore_merges")))
    if key not in _SPLITTERS:
        raise ExportError(
            f"the tokenizer splits text by {list(steps)}, ignore_merges={key[1]}, which llama.cpp has no name for that "
            f"is known here ({', '.join(_SPLITTERS.values())}); export `merged`"
        )
    return _SPLITTERS[key]


def _parts(section: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if section is None:
        return []
    return section[key] if section["type"] == "Sequence" else [section]


def _step(part: dict[str, Any]) -> str:
    """Return a step in short; one that is none of the known with all its options."""
    kind, pattern = part["type"], part.get("pattern", {})
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel regex" if part["use_regex"] else "ByteLevel"
    if kind == "Digits" and part["individual_digits"]:
        return "Digits"
    if kind == "Split" and "Regex" in pattern and part["behavior"] == "Isolated" and not part["invert"]:
        return f"Split {pattern['Regex']}"
    return json.dumps(part)


def _vocabulary(tokenizer: Any, spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    ids = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(ids) >= vocab_size:
        raise ExportError(
            f"the tokenizer has a token of id {max(ids)}, but the embedding has {vocab_size} rows: they do not belong "
            "together"
        )
    added = {t["content"]: TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED for t in spec["added_tokens"]}
    kinds = added | {spec["model"].get("unk_token"): TokenType.UNKNOWN}
    if spec["model"].get("byte_fallback"):
        kinds |= {token: TokenType.BYTE for token in ids.values() if _BYTE.fullmatch(token)}
    tokens = [ids.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    return tokens, [kinds.get(t, TokenType.NORMAL) if i in ids else TokenType.UNUSED for i, t in enumerate(tokens)]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), index)
    return [-float(rank.get(token, 0)) for token in tokens]


def _starts_with_space(spec: dict[str, Any]) -> bool:
    steps = [*_parts(spec["normalizer"], "normalizers"), *_parts(spec["pre_tokenizer"], "pretokenizers")]
    return any(
        (s["type"] == "Prepend" and s["prepend"] == _WORD_START)
        or (s["type"] == "Metaspace" and s["prepend_scheme"] != "never")
        for s in steps
    )


def _add_special(writer: GGUFWriter, tokenizer: Any, folder: Path, vocab_size: int, *, merges: bool) -> None:
    special = SpecialVocab(folder, load_merges=merges, n_vocab=vocab_size)
    ids = tokenizer("a").input_ids
    # Said in any case: what llama.cpp does without it depends on the algorithm.
    special.add_special_token |= {
        "bos": ids[0] == tokenizer.bos_token_id,
        "eos": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _notes(spec: dict[str, Any], sentencepiece: bool) -> tuple[str, ...]:
    kinds = [part["type"] for part in _parts(spec["normalizer"], "normalizers")]
    if sentencepiece or not kinds:
        return ()
    return (f"llama.cpp does not normalize text ({', '.join(kinds)}) before it splits it, as the tokenizer does",)
