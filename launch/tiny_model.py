"""Writes what configs/tiny_cpu.yaml trains on: ``python launch/tiny_model.py [FOLDER]`` (default: runs/tiny).

    FOLDER/model          a random Llama of 119,232 parameters in fp32, one token per byte
    FOLDER/train.jsonl    80 rows of the quickstart's task; FOLDER/valid.jsonl: 16 rows that are not among them

The same bytes every time, in a second and without a network: for trying launchers, not for learning anything.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qaft.quickstart.task import write_task

END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def write_model(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print("usage: python launch/tiny_model.py [FOLDER]", file=sys.stderr)
        raise SystemExit(2)
    folder = Path(*(arguments or ["runs/tiny"]))
    write_model(folder / "model")
    write_task(folder, train=80, valid=16)
    print(f"wrote {folder / 'model'}, {folder / 'train.jsonl'}, {folder / 'valid.jsonl'}")


if __name__ == "__main__":
    main(sys.argv[1:])
