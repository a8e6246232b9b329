"""The command `imgdit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Controllable image generation with diffusion transformers.", no_args_is_help=True, add_completion=False
)
bench = typer.Typer(help="Measure this machine: speed as ratios within one run.", no_args_is_help=True)
data = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")


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


@data.command()
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


@bench.command()
def forward(
    rounds: Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line instead of a table.")] = False,
) -> None:
    """Time MMDiT's forward pass against diffusers' FLUX and SD3 transformers, and its modulation per frame.

    Ratios below 1 mean that ours is faster. Runs are interleaved; medians and the spread of the pairs are printed.
    """
    import torch

    from imgdit.evaluation import speed

    torch.set_num_threads(threads)
    element = getattr(torch, dtype, None)
    if not isinstance(element, torch.dtype):
        raise typer.BadParameter(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if not as_json:
        peak = speed.gemm_peak(device=device, dtype=element)
        typer.echo(f"torch {torch.__version__}, {device}, {dtype}, {threads} thread(s); GEMM {peak / 1e9:.0f} GFLOP/s")
        typer.echo(f"{'work':<44}{'against':<26}{'ours':>9}{'other':>9}{'ratio':>8}{'spread':>16}{'max diff':>10}")
    for row in speed.forward_comparisons(rounds=rounds, device=device, dtype=element):
        if as_json:
            typer.echo(json.dumps(row._asdict()))
        else:
            typer.echo(
                f"{row.work:<44}{row.against:<26}{row.ours * 1e3:>6.1f} ms{row.other * 1e3:>6.1f} ms{row.ratio:>8.3f}"
                f"{f'{row.low:.3f}-{row.high:.3f}':>16}{row.difference:>10.1e}"
            )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
