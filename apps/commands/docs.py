"""`imgdit docs`: what of docs/ is made by commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from imgdit.apps.commands.mup import coord_check, transfer
from imgdit.apps.console import calm, user_errors
from imgdit.defaults import STEPS

app = typer.Typer(help="Make the parts of docs/ that are made by commands.", no_args_is_help=True)


@app.command()
def api(
    out: Annotated[Path, typer.Argument(help="File to write.")] = Path("docs/api.md"),
) -> None:
    """Write the API page from the docstrings."""
    from imgdit.apps.chores.api_page import api_page

    out.write_text(api_page(), encoding="utf-8")
    typer.echo(f"wrote {out}")


@app.command()
def architecture(
    out: Annotated[Path, typer.Argument(help="File to write.")] = Path("docs/images/architecture.png"),
) -> None:
    """Draw the diagram of frames, attention and adapters."""
    with user_errors():
        from imgdit.apps.chores.architecture import draw_architecture

        typer.echo(f"wrote {draw_architecture(out)}")


@app.command()
def images(
    out: Annotated[Path, typer.Argument(help="Folder; the sheets go into its folder `images`.")] = Path("docs"),
    model: Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Images of each kind of the benchmark.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = STEPS,
    mup: Annotated[bool, typer.Option(help="The plots of μP too: ten minutes of processor time.")] = False,
    work: Annotated[Path, typer.Option(help="Folder of the sweep of --mup.")] = Path("outputs/docs"),
) -> None:
    """Generate the images of the documentation, and the numbers of the benchmark whose sheets are among them."""
    with user_errors():
        calm()
        from imgdit.apps.chores.docs_images import make_images
        from imgdit.checkpoints import SCENES

        for file in make_images(out, model=model or SCENES, count=count, steps=steps):
            typer.echo(f"wrote {file}")
        if mup:
            coord_check(out=work / "coordinates")
            typer.echo(f"wrote {shutil.copy(work / 'coordinates/coordinates.png', out / 'mup-coordinates.png')}")
            transfer(quick=True, out=work / "transfer")
            typer.echo(f"wrote {shutil.copy(work / 'transfer/transfer.png', out / 'mup-transfer.png')}")
