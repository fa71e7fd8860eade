from __future__ import annotations

import itertools
import random

import pytest

from qaft.errors import RecipeError
from qaft.rotation.choice import Choice
from qaft.rotation.choose import Bits, LayerErrors, choose, total_error
from qaft.rotation.errors import LinearErrors

BITS: tuple[Bits, ...] = ((False, False), (False, True), (True, False), (True, True))
EVERYTHING = Choice.uniform(2, residual=True, values=True, attention=True, down=True)
NOTHING = Choice.uniform(2, residual=False, values=False)


def _errors(delta_y: float) -> LinearErrors:
    return LinearErrors(delta_w=0, delta_x=0, delta_g=0, delta_y=delta_y, crest_w=0, crest_x=0, top_token=0)


def _random_layer(random: random.Random) -> LayerErrors:
    beside = {"q": "", "v": "values", "o": "values", "up": "down", "down": "down"}
    linears = {
        name: {bits: _errors(random.random()) for bits in BITS if met or not bits[1]} for name, met in beside.items()
    }
    pair = random.random(), random.random()
    return LayerErrors(linears, beside, keys=pair, values=(random.random(), random.random()))


def _all_choices(available: Choice) -> list[Choice]:
    flags = [available.residual, *available.values, *available.attention, *available.down]
    options = [(False, True) if flag else (False,) for flag in flags]
    return [
        Choice(residual=f[0], values=f[1:3], attention=f[3:5], down=f[5:7])  # type: ignore[arg-type]
        for f in itertools.product(*options)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "available",
    [
        EVERYTHING,
        Choice.uniform(2, residual=True, values=True),
        Choice.uniform(2, residual=False, values=True, down=True),
        NOTHING,
    ],
)
def test_the_choice_is_the_best_of_all_that_are_available(seed: int, available: Choice) -> None:
    generator = random.Random(seed)
    layers = [_random_layer(generator) for _ in range(2)]
    best = min(total_error(layers, choice) for choice in _all_choices(available))
    chosen = choose(layers, available)
    assert total_error(layers, chosen) == pytest.approx(best)
    assert chosen in _all_choices(available)


def test_of_two_equal_errors_the_one_without_rotation_wins() -> None:
    beside = {"q": "", "v": "values", "down": "down"}
    linears = {name: dict.fromkeys(BITS, _errors(0.5)) for name in beside}
    layers = [LayerErrors(linears, beside, keys=(0.1, 0.1), values=(0.2, 0.2))] * 2
    assert choose(layers, EVERYTHING) == NOTHING


def test_a_choice_survives_as_lists_of_layers() -> None:
    choice = Choice(residual=True, values=(False, True), attention=(True, False), down=(False, False))
    assert choice.layers() == {"residual": True, "values": [1], "attention": [0], "down": []}
    assert Choice.of_layers(2, **choice.layers()) == choice
    assert choice.online and bool(choice)
    assert not NOTHING


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"qat\.rotated\.down: 2 must be a layer, 0 to 1"):
        Choice.of_layers(2, residual=True, down=[2])
