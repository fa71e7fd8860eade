"""The verbs of ``qaft patch``, parsed; what they do is in ``qaft.commands.patch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

verbs = typer.Typer(
    name="patch",
    help="Keep one packed base and many fine-tunes: small, exact, reversible changes of its rows.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PatchFolder = Annotated[Path, typer.Argument(help="folder that `qaft export -f patch` wrote")]
Out = Annotated[Path | None, typer.Option(help="new folder; default: change the folder itself")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@verbs.command()
def base(
    recipe: Annotated[Path, typer.Argument(help="recipe (YAML) or run folder")],
    out: Annotated[Path, typer.Option(help="new folder")],
    force: Annotated[bool, typer.Option(help="replace what is there")] = False,
    verify: Annotated[bool, typer.Option(help="reload it in a fresh process and compare")] = True,
    debug: Debug = False,
) -> None:
    """Write the packed base that the patches of RECIPE belong to."""
    from qaft.recipe import load_recipe

    resolved = load_recipe(recipe)
    from qaft.commands.patch import export_base

    export_base(resolved, out, force=force, verify=verify)


@verbs.command()
def apply(
    patch: PatchFolder,
    base: Annotated[Path, typer.Option(help="packed checkpoint of the base")],
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Put PATCH onto a packed base: the result is the trained model, bit for bit."""
    from qaft.commands.patch import apply_to

    apply_to(patch, base, out)


@verbs.command()
def revert(
    patch: PatchFolder,
    base: Annotated[Path, typer.Option(help="checkpoint that the patch was put onto")],
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Take PATCH off again: every file is what it was before, byte for byte."""
    from qaft.commands.patch import revert_from

    revert_from(patch, base, out)
