"""`imgdit sae`: sparse autoencoders on a pipeline's activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.apps.commands.options import Engine, Workers, with_loading
from imgdit.apps.console import at_work, user_errors
from imgdit.defaults import STEPS
from imgdit.pipelines.load_options import LoadOptions

app = typer.Typer(help="Sparse autoencoders: train them, look at their features.", no_args_is_help=True)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    folder: Annotated[Path | None, typer.Option(help="Where the run writes, instead of the recipe's folder.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's latest checkpoint.")] = False,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Stop with a checkpoint after this step.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what it costs, from configurations alone.")] = False,
    teraflops: Annotated[float, typer.Option(min=0.1, help="With --plan: what a GPU reaches.")] = 400.0,
) -> None:
    """Train autoencoders on the activations of a pipeline, and select the features of concepts."""
    import dataclasses

    from imgdit.training.sae_recipe import load_sae_recipe
    from imgdit.training.sae_run import train_saes

    with at_work({"resume it": "go on with --resume,", r"run\.folder": "--folder"}):
        loaded = load_sae_recipe(recipe)
        if folder is not None:
            loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, folder=str(folder)))
        if plan:
            from imgdit.training.sae_plan import sae_plan_lines

            for line in sae_plan_lines(loaded, teraflops * 1e12):
                typer.echo(line)
            return
        result = train_saes(loaded, resume=resume, stop_at=stop_at)
    for hookpoint, values in result.metrics.items():
        line = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        typer.echo(f"{hookpoint}: {line}")
    typer.echo(f"step {result.step}: {result.folder}")


@app.command()
def collect(
    recipe: Annotated[str, typer.Argument(help="A recipe whose data.shards names a folder for activations.")],
    engine: Engine = "local",
    workers: Workers = 1,
) -> None:
    """Record the activations that a recipe trains on; start it again to go on."""
    from imgdit.apps.jobs.bulk import collect_all
    from imgdit.training.sae_recipe import load_sae_recipe

    with at_work():
        loaded = load_sae_recipe(recipe)
        maps = sum(shard["maps"] for shard in collect_all(loaded, engine=engine, workers=workers))
    typer.echo(f"recorded {maps:,} maps per hookpoint into {loaded.data.shards}; the others were there")


@app.command()
@with_loading
def features(
    sae: Annotated[Path, typer.Argument(help="Folder of one autoencoder.")],
    pipeline: Annotated[str, typer.Argument(help="Folder or Hub repository of the pipeline it was trained on.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to generate images of; hundreds are better than a few.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one on each line.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Prompts without what is looked for: features are searched by contrast.")
    ] = None,
    feature: Annotated[list[int] | None, typer.Option(help="Show these instead of searching.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Features to show.")] = 12,
    top: Annotated[int, typer.Option(min=1, help="Images of each feature.")] = 8,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="Names features by its descriptions of their images: embedded, a folder or a Hub id. By default "
            "embedded for the embedded pipeline; for others the words of the prompts name them."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = STEPS,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first image.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write; started again, a run goes on there.")] = Path(
        "outputs/features"
    ),
    *,
    loading: LoadOptions,
) -> None:
    """Write what features do as a site in a folder: search by words, images, heat maps, density, time."""
    import torch

    from imgdit.checkpoints import EMBEDDED
    from imgdit.io.text import read_lines
    from imgdit.pipelines.image_text_loading import load_image_text_pipeline
    from imgdit.pipelines.loading import chosen_device, load_pipeline
    from imgdit.sae.feature_parts import FeatureParts
    from imgdit.sae.model import load_sae
    from imgdit.sae.report import write_report

    with at_work():
        lines = [*(prompt or ()), *(line for line in (read_lines(prompts) if prompts else ()) if line.strip())]
        if not lines:
            raise ValueError("nothing is generated: give --prompt TEXT or --prompts FILE")
        model = load_sae(sae)
        pipe = load_pipeline(pipeline, loading)
        pipe.set_progress_bar_config(disable=True)
        model.to(chosen_device(loading))
        call: dict[str, Any] = {"num_inference_steps": steps}
        if guidance is not None:
            call["guidance_scale"] = guidance
        parts = FeatureParts(pipe, model, lines, out, seed=seed, **call)
        survey = parts.survey()
        scores = parts.contrast(against) if against else None
        # The strongest by contrast; without one, by their mean activation.
        ranked = (survey.means if scores is None else scores).mean(0).topk(min(count, model.config.num_latents))
        chosen = feature or ranked.indices.tolist()
        shown = parts.heat_maps(chosen, {n for one in chosen for n, _, _ in survey.top_images(one, top)})
        captions, captioner = None, captioner or (EMBEDDED if pipeline == EMBEDDED else None)
        if captioner is not None:
            writer = load_image_text_pipeline(captioner, loading)
            writer.set_progress_bar_config(disable=True)

            def describe(images: list[Any]) -> list[str]:
                generators = [torch.Generator().manual_seed(0) for _ in images]
                return writer.caption(images, generator=generators).texts

            captions = parts.captions(shown, describe, captioner)
        title = f"Features of {sae.name}"
        page = write_report(out, survey, shown, lines, scores=scores, captions=captions, title=title, top=top)
    typer.echo(f"wrote {page}; open it in a browser")


@app.command()
def push(
    saes: Annotated[str, typer.Argument(help="Folder or Hub repository of autoencoders with their concepts.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    concept: Annotated[list[str] | None, typer.Option(help="Upload only this concept; several may be given.")] = None,
    selection: Annotated[
        str | None,
        typer.Option(help="Folder or Hub repository that has the autoencoders: upload the concepts alone, kilobytes."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image of the card.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", "--license", help="Such as apache-2.0.")] = None,
    description: Annotated[str | None, typer.Option(help="Markdown: what they are for, what they cannot do.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the pipeline; by default the recipe's.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the files and the card here, and upload nothing.")] = None,
) -> None:
    """Upload autoencoders and concepts with a model card: image, recipe, metrics, licence, how to load them."""
    import dataclasses

    from imgdit.sae.unlearning import ConceptUnlearner
    from imgdit.training.sae_details import run_details

    with at_work({"saes must be": "--selection must be"}):
        details = run_details(saes)
        details = dataclasses.replace(
            details,
            description=description,
            licence=licence,
            image=image,
            base_model=base_model or details.base_model,
        )
        unlearner = ConceptUnlearner.from_pretrained(saes)
        if out is not None:
            unlearner.save_pretrained(out, concepts=concept, saes=selection, card=details, name=repository)
            typer.echo(f"wrote {out}")
            return
        options: dict[str, Any] = {"concepts": concept, "saes": selection, "private": private or None}
        typer.echo(unlearner.push_to_hub(repository, card=details, **options))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="sdxl-unbox's folder (config.json, state_dict.pth), or DifFRACT's folder of transcoder_*.pt or "
            "sae_*.pt, or one of its files."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write cfg.json and sae.safetensors to.")],
) -> None:
    """Convert published pickles to safetensors, by a reader that admits nothing but tensors."""
    from imgdit.sae.convert import convert_published

    with user_errors():
        for written in convert_published(source, folder):
            typer.echo(f"wrote {written}")
