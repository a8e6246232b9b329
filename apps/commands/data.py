"""`imgdit data`: training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at training data.", no_args_is_help=True)


@app.command()
def preview(
    out: Annotated[Path, typer.Argument(help="Picture file to write.")] = Path("outputs/scenes.png"),
    count: Annotated[int, typer.Option(min=1, help="Scenes to show.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first.")] = 0,
    split: Annotated[str, typer.Option(help="train, heldout or heldout_triples.")] = "train",
    task: Annotated[str | None, typer.Option(help="Show pairs of a task, such as depth.")] = None,
) -> None:
    """Write a contact sheet of the procedural scenes over their captions."""
    from imgdit.data.preview import preview

    try:
        path = preview(out, count, seed, split=split, task=task)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"wrote {path}")
