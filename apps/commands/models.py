"""`imgdit models`: families of models, and the memory of one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from imgdit.apps.console import at_work


def models(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a pipeline, or embedded: its memory instead of the list.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """List the families of models with what works for each, and known adapters; or the memory that a model takes."""
    with at_work():
        from imgdit.apps import models as found

        if model is not None:
            parts = found.memory(model)
            typer.echo(json.dumps(parts) if as_json else "\n".join([model, *found.memory_lines(parts)]))
            return
        rows = found.family_table()
    if as_json:
        typer.echo(json.dumps(rows))
        return
    columns = [name for name in rows[0] if name not in ("class", "adapters")]
    typer.echo(f"{'transformer':<32}" + "".join(f"{name:<13}" for name in columns))
    for row in rows:
        cells = "".join(f"{'yes' if row[name] else '-':<13}" for name in columns)
        typer.echo(f"{row['class']:<32}{cells}".rstrip())
    typer.echo("conditions: image conditions by LoRA adapters. activations: sparse autoencoders and unlearning.")
    for row in rows:
        if row["adapters"]:
            typer.echo(f"adapters of {row['class']} whose settings are known: {', '.join(row['adapters'])}")
    typer.echo("memory of a model: imgdit models FOLDER")
