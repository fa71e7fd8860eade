"""``qaft rotate``: measure what every rotation does to the quantization of a model, and which of them it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qaft.build import default_device
from qaft.errors import RecipeError
from qaft.models.skeleton import linear_names
from qaft.models.source import source_of
from qaft.recipe import Recipe
from qaft.registry import build_from
from qaft.rotation.choice import Choice
from qaft.rotation.choose import LayerErrors, total_error
from qaft.rotations import Measured, measure
from qaft.selection import SELECTORS

REPORT = "rotations.json"
PICTURE = "rotations.png"
KINDS = {"values": "R2 values", "attention": "R3 keys", "down": "R4 down"}


def measure_recipe(recipe: Recipe, console: Console, *, out: Path | None = None) -> Measured:
    """Print the errors with and without each rotation; write them as JSON and as a heat map.

    Args:
        recipe: with a qat section and data.train.
        console: where the table goes.
        out: folder of the files; default: ``train.output``.

    Raises:
        RecipeError: there is no qat section, or no data.
        ModelError: the family is not known, or a width has no such rotation.
        DataError: there is nothing to calibrate on.
    """
    if recipe.qat is None:
        raise RecipeError("qaft rotate: the recipe has no qat section, so nothing is quantized; add one")
    source = source_of(recipe.model)
    selector = build_from(SELECTORS, recipe.select.kind, recipe.select.options, where="select")
    selected = selector(linear_names(source.config, trust_remote_code=recipe.model.trust_remote_code))
    measured = measure(recipe, source, frozenset(selected), default_device())
    console.print(errors_table(measured))
    console.print(_verdict(measured), highlight=False)
    folder = out or Path(recipe.train.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report(recipe, measured), indent=1) + "\n", encoding="utf-8")
    written = [folder / REPORT, *_picture(measured, folder / PICTURE, console)]
    console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return measured


def errors_table(measured: Measured) -> Table:
    """Return the summed relative output errors of each layer without and with every rotation; the chosen ones bold."""
    kinds = [kind for kind in KINDS if any(_pair(layer, measured, i, kind) for i, layer in enumerate(measured.layers))]
    title = "relative error of quantized outputs, summed per place: without -> with the rotation"
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("layer", "R1 stream", *(KINDS[kind] for kind in kinds), "crest of inputs", "top token"):
        table.add_column(column, justify="right")
    for i, layer in enumerate(measured.layers):
        residual = _residual_pair(layer, measured, i)
        cells = [_arrow(residual, measured.choice.residual)]
        for kind in kinds:
            cells.append(_arrow(_pair(layer, measured, i, kind), getattr(measured.choice, kind)[i]))
        before, after = crests(layer)
        table.add_row(str(i), *cells, f"{before:.1f} -> {after:.1f}", f"{top_token(layer, measured.choice, i):.0%}")
    return table


def crests(layer: LayerErrors) -> tuple[float, float]:
    """Return the largest crest factor of the inputs of a layer's linears, without and with its rotations."""
    plain = [errors[False, False].crest_x for errors in layer.linears.values()]
    turned = [errors[max(errors)].crest_x for errors in layer.linears.values()]
    return max(plain), max(turned)


def top_token(layer: LayerErrors, choice: Choice, i: int) -> float:
    """Return the largest share of an input's quantization error that one token has, under the choice."""
    return max(errors[_bits(layer, name, choice, i)].top_token for name, errors in layer.linears.items())


def report(recipe: Recipe, measured: Measured) -> dict[str, Any]:
    """Return everything that was measured, JSON-able; keys ``R1,other`` are ``H`` or ``I`` each."""
    assert recipe.qat is not None
    return {
        "model": recipe.model.name,
        "qat": recipe.qat.model_dump(mode="json"),
        "chosen": measured.choice.layers(),
        "available": measured.available.layers(),
        "total_error": totals(measured),
        "layers": [
            {
                "linears": {
                    name: {",".join("IH"[bit] for bit in bits): asdict(e) for bits, e in errors.items()}
                    for name, errors in layer.linears.items()
                },
                "keys": layer.keys,
                "values": layer.values,
            }
            for layer in measured.layers
        ],
    }


def totals(measured: Measured) -> dict[str, float]:
    """Return the summed error without rotations, with all that are available, and with the chosen ones."""
    nothing = Choice.uniform(len(measured.layers), residual=False, values=False)
    choices = {"none": nothing, "all": measured.available, "chosen": measured.choice}
    return {name: total_error(measured.layers, choice) for name, choice in choices.items()}


def _verdict(measured: Measured) -> str:
    errors = totals(measured)
    used = measured.choice.layers()
    places = [f"R1 {'on' if used['residual'] else 'off'}"]
    places += [f"{KINDS[kind]} in {len(used[kind])} of {len(measured.layers)} layers" for kind in KINDS]
    summed = ", ".join(f"{name} {error:.4g}" for name, error in errors.items())
    return f"summed error: {summed}\nchosen: {'; '.join(places)}"


def _bits(layer: LayerErrors, name: str, choice: Choice, i: int) -> tuple[bool, bool]:
    met = layer.beside[name]
    return choice.residual, bool(met) and getattr(choice, met)[i]


def _residual_pair(layer: LayerErrors, measured: Measured, i: int) -> tuple[float, float] | None:
    """Return the summed errors of all linears without and with R1, the other rotations as chosen."""
    if not measured.available.residual:
        return None
    sums = [0.0, 0.0]
    for name, errors in layer.linears.items():
        beside = _bits(layer, name, measured.choice, i)[1]
        for residual in (False, True):
            sums[residual] += errors[residual, beside].delta_y
    return sums[0], sums[1]


def _pair(layer: LayerErrors, measured: Measured, i: int, kind: str) -> tuple[float, float] | None:
    """Return the summed errors of one place without and with its rotation, R1 as chosen; None where it has none."""
    if not getattr(measured.available, kind)[i]:
        return None
    without, with_it = (layer.cost(kind, measured.choice.residual, used) for used in (False, True))
    return without, with_it


def _arrow(pair: tuple[float, float] | None, chosen: bool) -> Text:
    if pair is None:
        return Text("-")
    parts = [f"{value:.4f}" for value in pair]
    styles = ("", "bold green") if chosen else ("bold green", "")
    return Text.assemble((parts[0], styles[0]), " -> ", (parts[1], styles[1]))


def _picture(measured: Measured, path: Path, console: Console) -> Sequence[Path]:
    try:
        # An extra of the package.
        from qaft.commands.rotation_map import draw_errors
    except ImportError:
        console.print("no heat map: it needs matplotlib; pip install qaft[plot]", highlight=False)
        return ()
    return draw_errors(measured, path)
