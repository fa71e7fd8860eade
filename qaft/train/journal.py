"""A run of a two-point source as a text file: what was started from, and a few scalars for every step.

    journal.jsonl   {"journal": 2, "generator", "base", "start", "recipe", "digest"}       header
                    {"step", "c", "epsilon", "ratio", "rates", "loss", "tokens", "digest"}  one line per step
                    {"step", "parameters", "digest"}                                        with every checkpoint

The digest of a line covers the line and the digest before it, so that a changed, lost or cut line is found and named.
``c`` and the recipe decide the step (see ``replay.py``); ``parameters`` is the hash that a replay must arrive at.
About 200 bytes per step.

It lies in the run folder beside the ordinary checkpoints, which are its snapshots: a run that is continued loads the
newest checkpoint and replays the lines after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaft.errors import TrainingError
from qaft.philox import GENERATOR

JOURNAL = "journal.jsonl"
"""Name of the journal inside a run folder."""

_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a journal starts from.

    Attributes:
        base: ``base_digest`` of the model without its trained parameters.
        recipe: the resolved recipe as plain values.
        start: the first step of the journal; above 0 the checkpoint of that step is needed.
    """

    base: str
    recipe: Mapping[str, Any]
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer step.

    Attributes:
        step: its index, from 0.
        c: the scalars of the gradient source.
        epsilon: step of the probe.
        ratio: loss difference over rounding, measured where epsilon was chosen; None for no rounding seen.
        rates: learning rates by group name.
        loss: mean loss of the step.
        tokens: tokens of the step over all ranks.
    """

    step: int
    c: tuple[float, ...]
    epsilon: float
    ratio: float | None
    rates: Mapping[str, float]
    loss: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class JournalFile:
    """What can be trusted in a journal file.

    Attributes:
        header: its first line.
        records: the steps before anything that is damaged, without gaps.
        parameters: hash of the trained parameters by number of finished steps.
        problem: what is wrong with the first line that cannot be trusted; None for an intact file.
        lines: the good lines as they are in the file.
    """

    header: Header
    records: tuple[Record, ...]
    parameters: Mapping[int, str]
    problem: str | None
    lines: tuple[str, ...]


class Journal:
    """Appends to a journal; only rank 0 writes.

    Args:
        folder: the run folder.
        base: see ``Header``.
        recipe: see ``Header``.
        is_main: whether this is rank 0.
    """

    def __init__(self, folder: Path, *, base: str, recipe: Mapping[str, Any], is_main: bool = True) -> None:
        self.path = folder / JOURNAL
        self.base = base
        self._recipe = recipe
        self._is_main = is_main
        self._digest = ""

    def begin(self, start: int) -> None:
        """Write the header of a journal whose first step is ``start``."""
        if self._is_main:
            self._digest = ""
            header = Header(base=self.base, recipe=self._recipe, start=start)
            line = self._line({"journal": _FORMAT, "generator": GENERATOR, **asdict(header)})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(line, encoding="utf-8")

    def keep(self, lines: tuple[str, ...]) -> None:
        """Go on after these good lines of the file; what follows them is dropped."""
        if self._is_main:
            self._digest = json.loads(lines[-1])["digest"]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(temporary, self.path)

    def append(self, record: Record) -> None:
        """Write a step."""
        self._append(asdict(record))

    def check(self, step: int, parameters: str) -> None:
        """Write the hash of the parameters after ``step`` finished steps; the file is on disk afterwards."""
        self._append({"step": step, "parameters": parameters}, flush=True)

    def _append(self, content: Mapping[str, Any], *, flush: bool = False) -> None:
        if not self._is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(content))
            if flush:
                file.flush()
                os.fsync(file.fileno())

    def _line(self, content: Mapping[str, Any]) -> str:
        self._digest = _digest(self._digest, content)
        return json.dumps({**content, "digest": self._digest}) + "\n"


def read_journal(path: Path) -> JournalFile:
    """Return the trustworthy part of a journal; a damaged line after the header is named in ``problem``.

    Raises:
        TrainingError: there is no journal, or its header is damaged or of another format.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise TrainingError(f"{path}: no readable journal: {error}; give the {JOURNAL} of a run folder") from error
    content, digest, problem = _checked(lines[0], "")
    if problem is not None:
        raise TrainingError(f"{path}: its first line {problem}: what the journal starts from is unknown")
    if content.get("journal") != _FORMAT or content["generator"] != GENERATOR:
        raise TrainingError(
            f"{path}: format {content.get('journal')} with generator {content.get('generator')}; "
            f"this version reads format {_FORMAT} with {GENERATOR}"
        )
    header = Header(base=content["base"], recipe=content["recipe"], start=content["start"])
    found = _Lines(header.start)
    for number, line in enumerate(lines[1:-1] if lines[-1] == "" else lines[1:], start=2):
        content, digest, problem = _checked(line, digest)
        problem = problem or found.add(line, content)
        if problem is not None:
            problem = f"{path}, line {number} (after {found.step} finished steps) {problem}"
            break
    return JournalFile(
        header=header,
        records=tuple(found.records),
        parameters=found.parameters,
        problem=problem,
        lines=(lines[0], *found.lines),
    )


@dataclass
class _Lines:
    """The lines after the header, as far as they are good."""

    step: int
    records: list[Record] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, line: str, content: dict[str, Any]) -> str | None:
        """Take a line, or return what is wrong with it."""
        if "parameters" in content:
            self.parameters[content["step"]] = content["parameters"]
        elif content["step"] != self.step:
            return f"holds step {content['step']}"
        else:
            self.records.append(Record(**{**content, "c": tuple(content["c"])}))
            self.step += 1
        self.lines.append(line)
        return None


def _checked(line: str, before: str) -> tuple[dict[str, Any], str, str | None]:
    """Return content and digest of a line, and what is wrong with it."""
    try:
        content = json.loads(line)
        digest = content.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, before, "is cut short or no JSON"
    if digest != _digest(before, content):
        return {}, before, f"was changed: its digest is {digest}, not that of its content"
    return content, digest, None


def _digest(before: str, content: Mapping[str, Any]) -> str:
    text = before + json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def base_digest(model: nn.Module) -> str:
    """Return the SHA-256 of everything in a model that is saved and not trained: names, types, shapes, bytes."""
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    return _tensors_digest({n: t for n, t in model.state_dict().items() if n not in trained})


def parameters_digest(trainables: Mapping[str, Tensor]) -> str:
    """Return a hash of trained parameters: equal if and only if all their bits are."""
    return _tensors_digest(trainables)[:16]


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(content.numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
