"""The verb ``qaft merge-adapter``, parsed; what it does is in ``qaft.commands.merge_adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(name="merge-adapter")
def merge_adapter(
    adapter: Annotated[Path, typer.Argument(help="folder of a LoRA that PEFT has saved")],
    base: Annotated[str, typer.Option(help="folder or id of the 16-bit base model")],
    storage: Annotated[str, typer.Option(help="packed base: int4 | int8_group | nf4 | fp4")] = "int4",
    group_size: Annotated[
        int | None, typer.Option(help="int4, int8_group: weights per scale, -1: per channel; default: 128")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of all that is not packed: bfloat16 | float16 | float32")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="write the requantized export into this new folder")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="recipe of the QAT run; default: beside, where an update is lost")
    ] = None,
    data: Annotated[str | None, typer.Option(help="data.train of that recipe")] = None,
    force: Annotated[bool, typer.Option(help="overwrite, and export although the update does not survive")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print every layer as JSON")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Show how much of ADAPTER survives on the grid of a packed base, and write the QAT run that saves the rest."""
    from rich.console import Console

    from qaft.commands.merge_adapter import Merge, merge_adapter

    asked = Merge(
        adapter=adapter,
        base=base,
        storage=storage,
        dtype=dtype,
        group_size=group_size,
        out=out,
        recipe=recipe,
        data=data,
        force=force,
    )
    merge_adapter(asked, Console(), as_json=as_json)
