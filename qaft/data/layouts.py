"""From an Example to pieces of text, each trained or not, cut exactly where generation would begin.

The mask is not found by searching for markers but by rendering prefixes. For an assistant turn i

    before = render(turns[:i], generation prompt)      what the model is given when it has to answer
    after  = render(turns[:i + 1])                     the same with the answer and whatever ends it
    trained: after minus before

Plain layout of a conversation, for tokenizers without a chat template:

    ### User:
    <content>

    ### Assistant:
    <content><eos>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from qaft.data.examples import Completion, Conversation, Example, Text, Turn
from qaft.data.files import Provenance
from qaft.errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TURNS = "plain turns (### User:)"
"""Name of the plain layout of a conversation."""

RenderTurns = Callable[[Sequence[Turn], bool], str]
"""``(turns, add_generation_prompt) -> text``."""


class Piece(NamedTuple):
    """A stretch of text; ``trained`` says whether its tokens carry loss."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Layout:
    """How examples are written.

    Attributes:
        name: for reports.
        render: writes turns.
        wraps_completions: prompt and completion become a user and an assistant turn.
        adds_specials: the tokenizer's own BOS precedes the text, and EOS follows a completion or a text. A chat
            template writes its special tokens itself.
    """

    name: str
    render: RenderTurns
    wraps_completions: bool
    adds_specials: bool


def choose_layout(mode: str, name: str, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Return the layout for a value of ``data.chat_template`` and a format name.

    Raises:
        ModelError: a chat template is asked for that the tokenizer does not have, or it has no EOS token.
        RecipeError: a chat template is asked for plain text.
    """
    has_template = bool(tokenizer.chat_template)
    if mode == "tokenizer" and not has_template:
        raise ModelError(
            "data.chat_template=tokenizer: the tokenizer has no chat template; set data.chat_template to plain, "
            "or take the tokenizer of an instruction-tuned model"
        )
    if mode == "tokenizer" and name == "text":
        raise RecipeError("data.chat_template=tokenizer: the format text has no turns; set data.chat_template to plain")
    as_is = name in ("text", "classification")
    if mode == "tokenizer" or (mode == "auto" and has_template and not as_is):
        return Layout("chat template of the tokenizer", _template(tokenizer), True, False)
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so nothing would tell the model to stop; set its eos_token")
    turns = name in ("messages", "sharegpt", "instruction")
    return Layout(PLAIN_TURNS if turns else "as written", _plain(str(tokenizer.eos_token)), False, True)


def pieces(example: Example, layout: Layout) -> list[list[Piece]]:
    """Return the pieces of the example, one list for each sequence that it has to become (nearly always one).

    A template that writes earlier turns differently from the last one (it drops their reasoning, say) gives one
    sequence for each assistant turn, because no single text holds every turn as it is generated.

    Raises:
        DataError: the turns cannot be rendered, or the prompt is no prefix of the prompt with its answer.
    """
    match example:
        case Text(text=text):
            return [[Piece(text, True)]]
        case Completion(prompt=prompt, completion=completion) if not layout.wraps_completions:
            return [_cut(prompt + completion, [(len(prompt), len(prompt) + len(completion))])]
        case _:
            return _conversation(_turns(example), layout.render, example.source)


def prompt_and_answer(example: Example, layout: Layout) -> tuple[str, str]:
    """Return what the model is given to generate the last answer of the example, and that answer as the data holds it.

    Raises:
        DataError: there is no answer, or the turns cannot be rendered.
    """
    if isinstance(example, Text):
        raise DataError(f"{example.source}: the format text has no prompt to generate from")
    if isinstance(example, Completion) and not layout.wraps_completions:
        return example.prompt, example.completion
    turns = _turns(example)
    last = max(_answers(turns, example.source), default=0)
    if not last:
        raise DataError(f"{example.source}: no assistant turn to compare with; add one or remove the row")
    return _render(layout.render, turns[:last], True, example.source), turns[last].content


def _turns(example: Completion | Conversation) -> tuple[Turn, ...]:
    if isinstance(example, Conversation):
        return example.turns
    return Turn("user", example.prompt), Turn("assistant", example.completion)


def _conversation(turns: Sequence[Turn], render: RenderTurns, source: Provenance) -> list[list[Piece]]:
    full = _render(render, turns, False, source)
    spans: list[tuple[str, str]] = []
    for i in (i for i in _answers(turns, source) if turns[i].trained):
        before = _render(render, turns[:i], True, source)
        after = full if i + 1 == len(turns) else _render(render, turns[: i + 1], False, source)
        if not after.startswith(before):
            raise DataError(
                f"{source}: the chat template ends a prompt with {_difference(before, after)!r}, but writes the answer "
                f"of turn {i + 1} without it, so training would not see what generation gives; "
                "set data.chat_template to plain, or repair the template"
            )
        spans.append((before, after))
    if all(full.startswith(after) for _, after in spans):
        return [_cut(full, [(len(before), len(after)) for before, after in spans])]
    return [_cut(after, [(len(before), len(after))]) for before, after in spans]


def _answers(turns: Sequence[Turn], source: Provenance) -> list[int]:
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if answers[:1] == [0]:
        raise DataError(f"{source}: begins with an assistant turn; put a system or user turn before it")
    return answers


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    result, position = [], 0
    for begin, end in spans:
        result += [Piece(text[position:begin], False), Piece(text[begin:end], True)]
        position = end
    return [piece for piece in (*result, Piece(text[position:], False)) if piece.text]


def _difference(before: str, after: str) -> str:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    return before[same:][:60]


def _render(render: RenderTurns, turns: Sequence[Turn], generation: bool, source: Provenance) -> str:
    try:
        return render(turns, generation)
    except jinja2.TemplateError as error:
        raise DataError(f"{source}: the chat template refuses this conversation: {error}") from error


def _template(tokenizer: PreTrainedTokenizerBase) -> RenderTurns:
    def render(turns: Sequence[Turn], generation: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    return render


def _plain(eos: str) -> RenderTurns:
    def render(turns: Sequence[Turn], generation: bool) -> str:
        blocks = [
            f"### {turn.role.capitalize()}:\n{turn.content}{eos if turn.role == 'assistant' else ''}" for turn in turns
        ]
        return "\n\n".join([*blocks, "### Assistant:\n"] if generation else blocks)

    return render
