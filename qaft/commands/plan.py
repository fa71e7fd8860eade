"""``qaft plan``: what each process holds under every engine, from shapes alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qaft.compat.training import PARTITIONABLE
from qaft.plan import ENGINES, footprint, model_size, optimizer_state_bytes
from qaft.recipe import Recipe

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def print_plan(recipe: Recipe, *, world_size: int, console: Console | None = None) -> None:
    """Print the bytes per process for training without DeepSpeed and for every built-in configuration.

    Raises:
        QaftError: see ``model_size``.
    """
    console = console or Console()
    size = model_size(recipe)
    unit = next((name for name, scale in _UNITS.items() if size.frozen >= scale), "KiB")
    columns = ("frozen", "trained", "gradients", "optimizer", "device", "host")
    table = Table(title=f"{world_size} processes, {unit} on each", title_justify="left")
    for column in ("engine", *columns):
        table.add_column(column, no_wrap=True, justify="left" if column == "engine" else "right")
    for engine in ENGINES:
        state = optimizer_state_bytes(recipe, engine)
        held = footprint(size, engine, state=state, world_size=world_size)
        parts = (held.frozen, held.parameters, held.gradients, held.optimizer, held.device, held.host)
        chosen = " *" if engine == (recipe.train.deepspeed or "none") else ""
        table.add_row(f"{engine}{chosen}", *(f"{part / _UNITS[unit]:.2f}" for part in parts))
    console.print(table)
    console.print(_notes(recipe, size.num_trained), highlight=False, soft_wrap=True)


def _notes(recipe: Recipe, num_trained: int) -> str:
    notes = [
        f"{num_trained:,} trained parameters; * is the recipe's engine.",
        "Every stage replicates the frozen base and partitions what is trained.",
        "Without activations, gradient buckets and, at stage 3, the gathered parameters of a layer.",
    ]
    if recipe.optim.name not in PARTITIONABLE:
        notes.append(f"zero1 to zero3 are shown with adamw: {recipe.optim.name} cannot be partitioned.")
    return "\n".join(notes)
