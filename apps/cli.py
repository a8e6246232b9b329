"""The command `imgdit`; its groups of commands are in `imgdit.apps.commands`.

What a command needs is imported when it runs, so that `imgdit --help` costs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .commands import bench, data

app = typer.Typer(
    help="Controllable image generation with diffusion transformers.", no_args_is_help=True, add_completion=False
)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")


@app.command()
def demo(
    prompt: Annotated[list[str] | None, typer.Argument(help="Sentences of the words the model was taught.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the model and the picture.")] = Path("outputs/first-run"),
    steps: Annotated[int, typer.Option(help="Training steps, if the folder holds no model yet.")] = 600,
    seed: int = 0,
) -> None:
    """Make a picture sheet with a tiny model, trained on the spot on coloured shapes: about two minutes."""
    from . import first_run

    try:
        path = first_run.main(prompt or list(first_run.PROMPTS), out, steps, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"wrote {path}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe (scenes/autoencoder).")],
    folder: Annotated[Path | None, typer.Option(help="Where the run writes, instead of the recipe's folder.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's latest checkpoint.")] = False,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Stop with a checkpoint after this step.")] = None,
) -> None:
    """Train by a recipe. Several processes: `accelerate launch -m imgdit.apps.cli train RECIPE`."""
    from imgdit.training import load_recipe, train
    from imgdit.training.config import build_model
    from imgdit.training.sources import training_batches

    try:
        loaded = load_recipe(recipe)
        if folder is not None:
            loaded = loaded.replace(run={"folder": str(folder)})
        batches, held_out = training_batches(loaded)
        model = build_model(loaded)
        result = train(loaded, model=model, batches=batches, held_out=held_out, resume=resume, stop_at=stop_at)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"step {result.step}: {result.checkpoint}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
