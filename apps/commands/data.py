"""`imgdit data`: training data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imgdit.apps.commands.options import Engine, Workers, with_loading
from imgdit.apps.console import at_work, user_errors
from imgdit.defaults import GUIDANCE, STEPS
from imgdit.pipelines.load_options import LoadOptions

if TYPE_CHECKING:
    from imgdit.data import Rows

app = typer.Typer(help="Look at training data, check, convert and make it.", no_args_is_help=True)

SOURCE = "Folder of images with captions or metadata.jsonl, shards, what `datasets` saved, or hub:owner/name."
Source = Annotated[str, typer.Argument(help=SOURCE)]
Ignore = Annotated[list[str] | None, typer.Option(help="A column that means nothing here.")]
OPTIONS = {"skip_broken": "--skip-broken", r"ignore: \[(\w+)\]": r"--ignore \1"}
"""What the library calls its arguments, see `user_errors`."""
Rename = Annotated[list[str] | None, typer.Option(help="text=caption: the column `caption` is the text.")]


@app.command()
def preview(
    out: Annotated[Path, typer.Argument(help="Image file to write.")] = Path("outputs/scenes.png"),
    source: Annotated[str | None, typer.Option(help="Your data; the procedural scenes by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images to show.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first scene, or of the draw.")] = 0,
    split: Annotated[str, typer.Option(help="Scenes: train, heldout or heldout_triples.")] = "train",
    task: Annotated[str | None, typer.Option(help="Scenes: show pairs of a task, such as depth.")] = None,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Write a contact sheet of data over its captions."""
    from imgdit.data.preview import draw_sheet
    from imgdit.scenes.preview import preview

    with user_errors(OPTIONS):
        if source is None:
            path = preview(out, count, seed, split=split, task=task)
        else:
            path = draw_sheet(_rows(source, ignore, rename, split), out, count, seed)
    typer.echo(f"wrote {path}")


@app.command()
def check(
    source: Annotated[str | None, typer.Argument(help=f"{SOURCE} The recipe's by default.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Check what this recipe needs, with its columns.")] = None,
    min_side: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels of the shorter side, at least; by default half of the recipe's or model's."),
    ] = None,
    max_broken: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of unusable rows that is no failure.")
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder for check.txt and sheet.png.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 4,
    split: Annotated[str | None, typer.Option(help="Of data that has several; train by default.")] = None,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Read everything once and list what is wrong, file by file. Exit code 1 if too much is, or something is missing
    that the recipe needs."""
    from imgdit.data.control_folder import with_conditions
    from imgdit.data.linter import check
    from imgdit.data.preview import draw_sheet
    from imgdit.training import load_recipe
    from imgdit.training.user_images import settings_of
    from imgdit.training.user_images.needs import lacking, unfit

    with user_errors(OPTIONS):
        needs = None if recipe is None else settings_of(load_recipe(recipe))
        if source is None and needs is None:
            raise ValueError("name the data, or a recipe by --recipe")
        if needs is not None:
            source, split = source or needs.path, split or needs.source_split
            min_side = min_side or needs.least_side
            ignore = [*needs.ignore, *(ignore or ())]
            rename = [*(f"{ours}={theirs}" for ours, theirs in needs.columns.items()), *(rename or ())]
        rows = _rows(str(source), ignore, rename, split or "train")
        if needs is not None and needs.control is not None and needs.condition is not None:
            rows = with_conditions(rows, str(source), needs.control, needs.condition)
        refusal = (lambda row: None) if needs is None else partial(unfit, settings=needs)
        report = check(rows, min_side=min_side or _embedded_side() // 2, workers=workers, unfit=refusal)
        missing = [] if needs is None else lacking(rows.rows, report.rows, needs)
        lines = [
            f"{kind}: {p.name}: {p.kind}: {p.message}"
            for kind, found in (("problem", report.problems), ("warning", report.warnings))
            for p in found
        ]
        lines += [f"{recipe} needs: {prompt}" for prompt in missing]
        typer.echo("\n".join([*lines, str(report)]))
        if out is not None:
            if report.rows:
                typer.echo(f"wrote {draw_sheet(rows, out / 'sheet.png')}")
            out.mkdir(parents=True, exist_ok=True)
            (out / "check.txt").write_text("\n".join([*lines, str(report)]) + "\n", encoding="utf-8")
            typer.echo(f"wrote {out / 'check.txt'}")
    if missing:
        raise typer.Exit(1)
    if len(report.problems) > max_broken * (report.rows + len(report.problems)):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="shards or folder.")] = "shards",
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a shard, about.")] = 256,
    skip_broken: Annotated[bool, typer.Option(help="Leave rows out that the source cannot give.")] = False,
    split: Annotated[str, typer.Option(help="Of a `datasets` data set.")] = "train",
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Write data in another form: a folder as shards, or shards and `datasets` as a folder."""
    from imgdit.data.convert import convert
    from imgdit.naming import check_name

    with user_errors(OPTIONS):
        check_name("--to", to, ("shards", "folder"))
        rows = _rows(source, ignore, rename, split)
        convert(rows, out, shards=to == "shards", skip_broken=skip_broken, shard_size=shard_mb << 20)
    typer.echo(f"wrote {len(rows.rows):,} rows to {out}")


def _embedded_side() -> int:
    """Pixels of the smallest side that the embedded model was taught."""
    from imgdit.checkpoints import SCENES
    from imgdit.taught import read_taught

    return min(side for size in read_taught(SCENES).sizes for side in size)


def _lines(file: Path, what: str) -> list[str]:
    """What a text file says, line by line, without the empty ones."""
    from imgdit.io.text import read_lines

    texts = [line.strip() for line in read_lines(file) if line.strip()]
    if not texts:
        raise ValueError(f"{file} holds no {what}; expected one on each line")
    return texts


@app.command()
@with_loading
def generate(
    prompts: Annotated[Path, typer.Argument(help="Text file with a prompt per line.")],
    out: Annotated[Path, typer.Argument(help="Folder; can be trained on afterwards.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = STEPS,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale.")] = GUIDANCE,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image; the others count up.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    engine: Engine = "local",
    workers: Workers = 1,
    *,
    loading: LoadOptions,
) -> None:
    """Generate an image per line, however many; start it again to go on where it stopped."""
    from imgdit.apps.jobs.bulk import generate_all
    from imgdit.apps.jobs.request import Request
    from imgdit.apps.jobs.shelf import Shelf
    from imgdit.checkpoints import SCENES

    with at_work():
        texts = _lines(prompts, "prompt")
        shelf = Shelf(model or SCENES)
        shelf.check(Request())
        if remark := shelf.about_words(texts):
            typer.echo(remark, err=True)
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        done = generate_all(
            texts, out, str(model or SCENES), options=options, seed=seed, batch=batch, loading=loading, engine=engine,
            workers=workers,
        )  # fmt: skip
        count = sum(item["count"] for item in done)
    typer.echo(f"generated {count:,} of {len(texts):,} images in {out}; the others were there")


@app.command()
@with_loading
def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of images, with its sub-folders.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a pipeline that writes; see imgdit caption.")] = (
        "embedded"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; the pipeline's own number by default.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: the most probable tokens.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a caption at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all captions, with each file's name.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    engine: Engine = "local",
    workers: Workers = 1,
    *,
    loading: LoadOptions,
) -> None:
    """Write a caption beside each image that has none; start it again to go on where it stopped. Exit code 1 if an
    image could not be read."""
    from imgdit.apps.commands.captions import chosen_options
    from imgdit.apps.jobs.captions import caption_all

    with at_work():
        options = chosen_options(steps, temperature)
        done = list(
            caption_all(
                folder,
                model,
                options=options,
                length=length,
                seed=seed,
                batch=batch,
                loading=loading,
                engine=engine,
                workers=workers,
            )
        )
        broken = [line for item in done for line in item["broken"]]
    typer.echo("\n".join([*broken, f"wrote {sum(item['written'] for item in done):,} captions in {folder}"]))
    if broken:
        raise typer.Exit(1)


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(help="A recipe on the data user_images.")],
    engine: Engine = "local",
    workers: Workers = 1,
) -> None:
    """Compute the latents and text that a recipe's training reads; start it again to go on."""
    from imgdit.apps.jobs.bulk import cache_all
    from imgdit.training import load_recipe

    with at_work():
        rows = sum(item["count"] for item in cache_all(load_recipe(recipe), engine=engine, workers=workers))
    typer.echo(f"{rows:,} rows are cached")


@app.command()
@with_loading
def subjects(
    out: Annotated[Path, typer.Argument(help="Folder; can be trained on afterwards.")],
    count: Annotated[int, typer.Option(min=1, help="Pairs to make.")] = 100,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Pairs that score less are not kept.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the first pair; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = STEPS,
    model: Annotated[str | None, typer.Option(help="Another pipeline; draws both images as halves of one.")] = None,
    names: Annotated[Path | None, typer.Option(help="With --model: file with a thing per line.")] = None,
    scorer: Annotated[str | None, typer.Option(help="With --model: image encoder that compares the halves.")] = None,
    size: Annotated[int, typer.Option(min=1, help="With --model: pixels per side of a half.")] = 512,
    *,
    loading: LoadOptions,
) -> None:
    """Make pairs of images of the same thing, score them and keep the good ones."""
    from imgdit.data.subjects import make_subjects
    from imgdit.scenes import subject_pairs

    make: Any
    score: Any
    with at_work():
        if model is None:
            ideas = subject_pairs.scene_ideas(count, seed)
            make, score = subject_pairs.ScenePairs(steps=steps, loading=loading), subject_pairs.ProbeScore()
        elif names is None or scorer is None:
            raise ValueError("--model needs --names, a file with a thing per line, and --scorer, an image encoder")
        else:
            things = _lines(names, "thing")
            ideas = subject_pairs.named_ideas(things, count)
            make = subject_pairs.Diptychs(model, size, loading, num_inference_steps=steps)
            score = subject_pairs.FeatureScore(scorer)
        report = make_subjects(ideas, make, score, out, threshold=threshold, seed=seed)
    typer.echo(f"kept {report.kept} of {report.generated} pairs in {out}")


def _rows(source: str, ignore: list[str] | None, rename: list[str] | None, split: str) -> Rows:
    from imgdit.data.rows import Columns
    from imgdit.data.sources import open_rows

    renamed = dict(pair.partition("=")[::2] for pair in rename or [])
    return open_rows(source, Columns(renamed, tuple(ignore or ())), split)
