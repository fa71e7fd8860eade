"""The quickstart's data: reproducible, well-formed, and held-out combinations really are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qaft.quickstart.task import INTENTS, ROOMS, held_out, rows, write_task


def calls(which: str, count: int) -> list[dict]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows(which, count)]


def combination(call: dict) -> tuple[str, str]:
    return call["function"], call["room"]


def test_no_combination_of_validation_is_ever_seen_in_training() -> None:
    train, valid = ({combination(c) for c in calls(w, n)} for w, n in (("train", 1500), ("valid", 200)))
    assert not train & valid
    reserved = {(INTENTS[intent][0], room) for intent, room in held_out()}
    assert valid <= reserved


def test_training_covers_every_function_and_every_room() -> None:
    train = calls("train", 1500)
    assert {c["function"] for c in train} == {function for function, _, _ in INTENTS.values()}
    assert {c["room"] for c in train} == set(ROOMS)


def test_rows_are_distinct_and_the_same_on_every_machine(tmp_path: Path) -> None:
    train, valid = write_task(tmp_path)
    lines = train.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 1500
    assert len(valid.read_text().splitlines()) == 200
    digest = hashlib.sha256(train.read_bytes() + valid.read_bytes()).hexdigest()
    assert digest == DIGEST


DIGEST = "f32fd3486432d183ca826d0b53fd6a5caab06117e595b21163c488a85a52daf2"
