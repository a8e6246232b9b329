"""`imgdit push`: weights with a model card to the Hub, or to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imgdit.apps.console import at_work


def push(
    source: Annotated[Path, typer.Argument(help="Folder of a run, a LoRA file, or a pipeline's folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    image: Annotated[Path | None, typer.Option(help="Image of the card; of a run, its newest sample sheet.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", "--license", help="Such as apache-2.0.")] = None,
    description: Annotated[str | None, typer.Option(help="Markdown: what it is for, and what it cannot do.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that an adapter belongs to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the files and the card here, and upload nothing.")] = None,
) -> None:
    """Upload an adapter or a pipeline with a model card: image, recipe, metrics, licence, how to load it."""
    import tempfile

    from imgdit.apps.chores.sharing import card_folder
    from imgdit.cards import CardDetails
    from imgdit.hub import check_repository, push_folder

    with at_work(), tempfile.TemporaryDirectory() as temporary:
        check_repository(repository)
        details = CardDetails(description, licence, image, base_model=base_model)
        folder = card_folder(source, out or Path(temporary), details, repository)
        if out is not None:
            typer.echo(f"wrote {folder}")
            return
        typer.echo(push_folder(folder, repository, private=private or None))
