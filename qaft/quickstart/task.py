"""The quickstart's own task: home-automation requests in English, answered by one JSON function call.

Written by this project, so that nothing has to be downloaded or licensed. A seeded generator combines intents, rooms,
devices, values and phrasings; whole (intent, room) combinations are held out, so that the validation rows ask for calls
never seen in training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

SYSTEM = "Reply with one JSON function call."

ROOMS = (
    "kitchen", "bedroom", "living room", "bathroom", "garage", "hallway",
    "office", "nursery", "attic", "basement", "dining room", "guest room",
)  # fmt: skip
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
SOUNDS = ("jazz", "rain", "news", "rock", "piano", "ocean")

# intent -> (function, argument name or None, phrasings); {v} is the value, {r} the room
INTENTS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "light_on": ("light_on", None, (
        "Turn on the lights in the {r}.", "It is too dark in the {r}.", "Lights on in the {r}, please.")),
    "light_off": ("light_off", None, (
        "Turn off the lights in the {r}.", "Nobody is in the {r}, kill the lights.", "Make the {r} dark.")),
    "brightness": ("set_brightness", "percent", (
        "Dim the {r} to {v} percent.", "Set the {r} lights to {v}%.", "I want {v} percent light in the {r}.")),
    "color": ("set_color", "color", (
        "Make the {r} lights {v}.", "I would like {v} light in the {r}.", "Switch the {r} lamp to {v}.")),
    "temperature": ("set_temperature", "celsius", (
        "Heat the {r} to {v} degrees.", "Set the {r} to {v} C.", "I want it {v} degrees in the {r}.")),
    "fan": ("set_fan", "level", (
        "Run the {r} fan at level {v}.", "Fan speed {v} in the {r}.", "Put the fan in the {r} on {v}.")),
    "blinds_up": ("open_blinds", None, (
        "Open the blinds in the {r}.", "Let some sun into the {r}.", "Raise the {r} blinds.")),
    "blinds_down": ("close_blinds", None, (
        "Close the blinds in the {r}.", "Keep the sun out of the {r}.", "Lower the {r} blinds.")),
    "sound": ("play", "sound", (
        "Play {v} in the {r}.", "I want to hear {v} in the {r}.", "Some {v} for the {r}, please.")),
    "timer": ("set_timer", "minutes", (
        "Start a {v} minute timer in the {r}.", "Remind me in {v} minutes in the {r}.", "Timer in the {r}: {v} min.")),
}  # fmt: skip


def _value(argument: str | None, rng: random.Random) -> int | str | None:
    choices: dict[str | None, tuple[int | str, ...]] = {
        None: (),
        "percent": tuple(range(5, 100, 5)),
        "color": COLORS,
        "celsius": tuple(range(15, 27)),
        "level": (1, 2, 3, 4, 5),
        "sound": SOUNDS,
        "minutes": tuple(range(5, 65, 5)),
    }
    return rng.choice(choices[argument]) if choices[argument] else None


def _row(intent: str, room: str, rng: random.Random) -> dict[str, object]:
    function, argument, phrasings = INTENTS[intent]
    value = _value(argument, rng)
    call: dict[str, object] = {"function": function, "room": room}
    if argument is not None:
        call[argument] = value
    request = rng.choice(phrasings).format(r=room, v=value)
    turns = [("system", SYSTEM), ("user", request), ("assistant", json.dumps(call))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def held_out(seed: int = 0) -> set[tuple[str, str]]:
    """Return the (intent, room) combinations that training never sees: two rooms of every intent."""
    rng = random.Random(seed)
    return {(intent, room) for intent in INTENTS for room in rng.sample(ROOMS, 2)}


def rows(which: str, count: int, *, seed: int = 0) -> Iterator[dict[str, object]]:
    """Yield ``count`` different rows in the messages format; the same for the same arguments on every machine.

    Args:
        which: ``train`` or ``valid``; their (intent, room) combinations are disjoint.
        count: number of rows.
        seed: seed of the generator.
    """
    reserved = held_out(seed)
    pairs = [(i, r) for i in INTENTS for r in ROOMS if ((i, r) in reserved) == (which == "valid")]
    rng = random.Random(f"{which}-{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        row = _row(*rng.choice(pairs), rng)
        key = json.dumps(row)
        if key not in seen:
            seen.add(key)
            yield row


def write_task(folder: Path, *, train: int = 1500, valid: int = 200, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``valid.jsonl`` into ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "valid.jsonl"
    for path, which, count in zip(paths, ("train", "valid"), (train, valid), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(which, count, seed=seed)), encoding="utf-8")
    return paths
