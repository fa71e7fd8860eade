"""``qaft chat``: talk to a run or to any checkpoint."""

from __future__ import annotations

from rich.console import Console

from qaft.commands.memory import evaluation_memory
from qaft.commands.open import open_model
from qaft.evaluate.generation import generate, stop_ids_of


def chat_with(name: str, *, max_new_tokens: int) -> None:
    """Answer lines from the terminal, greedily, with the conversation so far; an empty line or end of input ends."""
    console = Console()
    opened = open_model(name)
    tokenizer, stop = opened.tokenizer, stop_ids_of(opened.model, opened.tokenizer)
    turns: list[dict[str, str]] = []
    while text := _read():
        turns.append({"role": "user", "content": text})
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
        else:
            # A model without a template continues text: there are no turns to remember.
            ids = tokenizer(text).input_ids
        with evaluation_memory("answering", {"max_new_tokens": max_new_tokens}):
            (answer,) = generate(opened.model, [ids], max_new_tokens=max_new_tokens, stop_ids=stop)
        reply = tokenizer.decode(answer, skip_special_tokens=True)
        turns.append({"role": "assistant", "content": reply})
        console.print(reply, highlight=False, markup=False)


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
