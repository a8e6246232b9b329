"""The command `imgdit`; its groups of commands are in `imgdit.apps.commands`.

What a command needs is imported when it runs, so that `imgdit --help` costs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit import __version__
from imgdit.apps.commands import bench, captions, convert, data, docs, images, lora, mup, sae, text
from imgdit.apps.commands.demo import demo
from imgdit.apps.commands.doctor import doctor
from imgdit.apps.commands.judge import judge
from imgdit.apps.commands.models import models
from imgdit.apps.commands.options import old_options
from imgdit.apps.commands.push import push
from imgdit.apps.console import Commands, at_work

app = typer.Typer(cls=Commands, no_args_is_help=True)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(convert.app, name="convert")
app.add_typer(docs.app, name="docs")
app.add_typer(lora.app, name="lora")
app.add_typer(mup.app, name="mup")
app.add_typer(sae.app, name="sae")

TRAIN_OPTIONS = {
    "pass resume=True": "go on with --resume,",
    "pass accept_data=True": "give --accept-data",
    r"run\.folder": "--folder",
}
"""What `train` calls its arguments, see `user_errors`."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"imgdit {__version__}")
        raise typer.Exit


@app.callback()
def imgdit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version and end.")
    ] = False,
) -> None:
    """Controllable image generation with diffusion transformers."""


app.command()(images.generate)
app.command()(images.control)
app.command("any", context_settings=old_options(given="condition", make="generate"))(images.any_to_any)
app.command()(images.unlearn)
app.command()(captions.caption)
app.command()(captions.answer)
app.command()(judge)
app.command()(text.write)
app.command()(text.embed)
app.command()(demo)
app.command()(doctor)
app.command()(models)
app.command()(push)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe (scenes/autoencoder).")],
    folder: Annotated[Path | None, typer.Option(help="Where the run writes, instead of the recipe's folder.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--from-kohya",
            "--from-comfy",
            help="Folder of images with captions beside, N_name for repeats, conditions in `control`: the data.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's latest checkpoint.")] = False,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Stop with a checkpoint after this step.")] = None,
    accept_data: Annotated[bool, typer.Option("--accept-data", help="Resume although the images changed.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe, such as run.steps=2000; repeatable.")
    ] = None,
    extend: Annotated[int | None, typer.Option(min=1, help="Go on from the latest checkpoint to this step.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only overfit one batch for a minute and tell whether its loss falls.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print memory, tokens per parameter and hours.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="With --plan: GPUs that share the weights (FSDP2).")] = 1,
    memory: Annotated[float | None, typer.Option(min=0, help="With --plan: a GPU's GB, if not this one's.")] = None,
) -> None:
    """Train by a recipe. Several processes: `accelerate launch -m imgdit.apps.cli train RECIPE`."""
    from imgdit.data.control_folder import folder_of_trainers
    from imgdit.recipes import read_changes
    from imgdit.training import load_recipe, train
    from imgdit.training.build import build_model
    from imgdit.training.sources import training_batches

    with at_work(TRAIN_OPTIONS):
        values = read_changes(changes or [])
        if extend is not None:
            resume, values["run.steps"] = True, extend
        if folder is not None:
            values["run.folder"] = str(folder)
        if images is not None:
            values |= folder_of_trainers(images)
        loaded = load_recipe(recipe, values)
        if check:
            from imgdit.training.overfit import overfit

            typer.echo(overfit(loaded).told)
            return
        if plan:
            from imgdit.apps.chores.training_plan import training_plan

            for line in training_plan(loaded, gpus=gpus, gigabytes=memory):
                typer.echo(line)
            return
        batches, held_out = training_batches(loaded)
        model = build_model(loaded)
        draw = _sheet(loaded, model, batches) if loaded.run.sample_every else None
        result = train(
            loaded,
            model=model,
            batches=batches,
            held_out=held_out,
            on_sample=draw,
            resume=resume,
            stop_at=stop_at,
            accept_data=accept_data,
        )
    typer.echo(f"step {result.step}: {result.checkpoint}")


def _sheet(recipe: Any, model: Any, batches: Any) -> Any:
    """What draws samples while a recipe's model trains; `None`: nothing does."""
    from imgdit.scenes.sources import FRAMES, STREAMS
    from imgdit.training.user_images.settings import USER_IMAGES

    if recipe.data.name in (FRAMES, *STREAMS):
        from imgdit.apps.chores.training_sheet import TrainingSheet

        return TrainingSheet(recipe, model)
    if recipe.data.name == USER_IMAGES:
        from imgdit.apps.chores.user_sheet import UserSheet, draws_sheets

        if draws_sheets(recipe, model):
            return UserSheet(recipe, model, batches.dataset)
        typer.echo(f"run.sample_every: no sheets of a {type(model).__name__} are drawn while it trains", err=True)
    return None


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run that trained a whole backbone.")],
    out: Annotated[Path, typer.Argument(help="Folder of the pipeline to write.")],
    half: Annotated[bool, typer.Option("--half", help="Store all weights in half precision.")] = False,
) -> None:
    """Write the pipeline of a run's latest checkpoint. For runs that trained a LoRA: `imgdit lora export`."""
    from imgdit.apps.chores.run_pipeline import BACKBONE_DATA, run_pipeline
    from imgdit.apps.chores.weights import taught_by
    from imgdit.taught import write_taught
    from imgdit.training.trained import trained_recipe

    with at_work():
        pipe = run_pipeline(run)
        for part in pipe.components.values() if half else ():
            if hasattr(part, "half"):
                part.half()
        pipe.save_pretrained(out)
        recipe = trained_recipe(run)
        if recipe.data.name in BACKBONE_DATA:
            write_taught(out, taught_by(recipe))
    typer.echo(f"wrote {out}")


@app.command()
def assemble(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs of the recipes scenes/…")] = Path("outputs/scenes"),
    out: Annotated[Path | None, typer.Option(help="Folder to write; in a checkout the embedded model's.")] = None,
) -> None:
    """Put trained runs together: pipeline, condition adapters, sparse autoencoders and probe of the embedded model."""
    from imgdit import checkpoints
    from imgdit.apps.chores.weights import assemble, save_adapter, save_probe, save_saes, save_texts
    from imgdit.pipelines.few_steps import TURBO
    from imgdit.pipelines.text_frames import FOLDER

    with at_work():
        if out is None and not (checkpoints.SCENES.parents[2] / "pyproject.toml").is_file():
            raise ValueError("say where by --out: the embedded model of an installed package is not replaced")
        scenes = out or checkpoints.SCENES
        assemble(runs / "transformer", scenes)
        for run in sorted(runs.glob("control_*")):
            save_adapter(run, scenes / "adapters" / f"{run.name.removeprefix('control_')}.safetensors")
        if (runs / "few_steps").is_dir():
            save_adapter(runs / "few_steps", scenes / TURBO)
        if (runs / FOLDER).is_dir():
            save_texts(runs / FOLDER, scenes / FOLDER)
        saes = [runs / name for name in ("sae", "sae_text") if (runs / name / "saes").is_dir()]
        if saes:
            save_saes(saes, scenes / "sae")
        if out is None:
            save_probe(runs / "probe", checkpoints.SCENE_PROBE)
    typer.echo(f"wrote {scenes}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
