"""`imgdit bench`: measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.apps.commands import speed
from imgdit.apps.commands.options import ModelFolder, Workers, model_folder, old_options
from imgdit.apps.console import at_work, user_errors
from imgdit.defaults import GUIDANCE, STEPS

app = typer.Typer(
    help="Measure: what a model makes, and how fast (speed as ratios within one run).", no_args_is_help=True
)

Probe = Annotated[Path | None, typer.Option(help="Folder of a probe; the embedded one by default.")]
Sheets = Annotated[Path, typer.Option(help="Folder of the raw numbers and the sheets.")]
Count = Annotated[int, typer.Option(min=1, help="Images of each kind.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Judge = Annotated[
    str | None, typer.Option(help="Folder or Hub id of a model that answers questions; asked besides the probe.")
]
Guidance = Annotated[float, typer.Option(min=0.0, help="Guidance scale.")]


def _measure(benchmark: str, model: Path | None, probe: Path | None, out: Path, *settings: Any) -> None:
    """Run a function of `imgdit.benchmarks.scenes.run` and print the table of its scores."""
    from imgdit.benchmarks.scenes import run as scene_bench
    from imgdit.checkpoints import SCENE_PROBE

    with at_work():
        scores = getattr(scene_bench, benchmark)(model_folder(model), probe or SCENE_PROBE, out, *settings)
    typer.echo(scene_bench.table(scores))
    typer.echo(f"wrote {out}")


@app.command()
def scenes(
    model: ModelFolder = None,
    probe: Probe = None,
    out: Sheets = Path("outputs/bench-scenes"),
    count: Count = 100,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
) -> None:
    """Measure a model of the scenes against exact ground truth: text, depth, edges, segmentation, views, time."""
    from imgdit.benchmarks.scenes import run as scene_bench
    from imgdit.checkpoints import SCENE_PROBE
    from imgdit.io.safe_json import read_object

    with at_work():
        scores = scene_bench.run(model_folder(model), probe or SCENE_PROBE, out, count, steps, guidance)
    typer.echo(scene_bench.table(scores))
    for name, values in read_object(out / "scenes.json")["seconds"].items():
        typer.echo(f"{name}: {min(values):.2f} to {max(values):.2f} s")
    typer.echo(f"wrote {out}")


@app.command()
def people(
    model: ModelFolder = None,
    probe: Probe = None,
    out: Sheets = Path("outputs/bench-people"),
    count: Annotated[int | None, typer.Option(min=1, help="Of the 200 prompts; all by default.")] = None,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
) -> None:
    """Measure prompts as people write them, without the grammar of captions: object, colour, style as asked?"""
    _measure("run_people", model, probe, out, count, steps, guidance)


@app.command("any")
def any_tasks(
    model: ModelFolder = None,
    probe: Probe = None,
    out: Sheets = Path("outputs/bench-any"),
    count: Count = 50,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
) -> None:
    """Measure the any-to-any tasks of a model of the scenes: restoring, maps, editing, subjects, views, cameras."""
    _measure("run_any", model, probe, out, count, steps, guidance)


@app.command()
def control(
    model: ModelFolder = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of the adapters; the model's by default.")] = None,
    probe: Probe = None,
    out: Sheets = Path("outputs/bench-control"),
    count: Count = 200,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    judge: Judge = None,
) -> None:
    """Measure condition adapters on scenes: are depth, edges, hole and subject obeyed, and the prompt still?"""
    from imgdit.benchmarks.scenes import run as scene_bench
    from imgdit.checkpoints import SCENE_PROBE

    with at_work():
        model = model_folder(model)
        folder = adapters or model / "adapters"
        scores = scene_bench.run_control(model, folder, probe or SCENE_PROBE, out, count, steps, guidance, judge)
    typer.echo(scene_bench.table(scores))
    typer.echo(f"wrote {out}")


@app.command()
def text(
    model: ModelFolder = None,
    probe: Probe = None,
    out: Sheets = Path("outputs/bench-text"),
    count: Count = 100,
    text_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a text; the pipeline's own by default.")
    ] = None,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    only: Annotated[
        str | None,
        typer.Option(help="captions, answers, fillings, round trips, judge, schedules, cache; commas between."),
    ] = None,
) -> None:
    """Measure what a model writes about images of scenes: captions, answers, fillings, round trips, judgements."""
    parts = [name.strip() for name in (only or "").split(",") if name.strip()]
    _measure("run_text", model, probe, out, count, text_steps, steps, guidance, parts)


@app.command(context_settings=old_options(sentences="prompts"))
def unlearn(
    model: ModelFolder = None,
    probe: Probe = None,
    saes: Annotated[Path | None, typer.Option(help="Folder of the autoencoders; MODEL/sae by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the raw numbers and the images; a run goes on there.")] = Path(
        "outputs/bench-unlearn"
    ),
    quick: Annotated[bool, typer.Option(help="Four targets, five methods, two seeds, 12 steps.")] = False,
    methods: Annotated[str | None, typer.Option(help="Names with commas between them.")] = None,
    targets: Annotated[str | None, typer.Option(help="Styles and objects with commas between them.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Images of each style with each object.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Per label, to learn from.")] = None,
    tune: Annotated[bool | None, typer.Option(help="Choose each method's settings on other seeds first.")] = None,
    together: Annotated[int | None, typer.Option(help="Seeds for several labels at once; 0: none.")] = None,
    attack: Annotated[int | None, typer.Option(help="Attacked prompts of each of four targets; 0: none.")] = None,
    attacks: Annotated[
        str | None, typer.Option(help="embedding, prompt, negative, paraphrase; commas between. All by default.")
    ] = None,
    conditions: Annotated[
        int | None, typer.Option(help="Images under a depth condition with each of four targets, and without.")
    ] = None,
    captions: Annotated[int | None, typer.Option(help="Captions of images with each target, and without.")] = None,
    judge: Judge = None,
) -> None:
    """Compare ways to unlearn styles and objects: what is gone, what is kept, what it costs."""
    import dataclasses

    from imgdit.benchmarks.unlearning import run as unlearn_bench
    from imgdit.benchmarks.unlearning.report import table
    from imgdit.checkpoints import SCENE_PROBE

    changed: dict[str, Any] = {
        "methods": methods and tuple(methods.split(",")),
        "targets": targets and tuple(targets.split(",")),
        "seeds": seeds,
        "steps": steps,
        "prompts": prompts,
        "tune": tune,
        "together": together,
        "attack": attack,
        "attacks": attacks and tuple(attacks.split(",")),
        "conditions": conditions,
        "captions": captions,
    }
    plan = unlearn_bench.QUICK if quick else unlearn_bench.UnlearnPlan()
    with at_work():
        plan = dataclasses.replace(plan, **{name: value for name, value in changed.items() if value is not None})
        model = model_folder(model)
        result = unlearn_bench.run(model, probe or SCENE_PROBE, saes or model / "sae", out, plan, judge)
    typer.echo(table(result))
    typer.echo(f"wrote {out}/unlearn.json and {out}/unlearn.md")


@app.command("sae-steering")
def sae_steering(
    model: ModelFolder = None,
    probe: Probe = None,
    saes: Annotated[Path | None, typer.Option(help="Folder of the autoencoders; MODEL/sae by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of numbers, curves and page; a run goes on there.")] = Path(
        "outputs/bench-sae-steering"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Four concepts, one image each, two strengths.")] = False,
    concepts: Annotated[str | None, typer.Option(help="Styles and objects with commas between them.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Of each label to learn from, and to detect it in.")] = None,
    images: Annotated[int | None, typer.Option(help="Steered for each direction and strength, up and down.")] = None,
    strengths: Annotated[str | None, typer.Option(help="Fractions of the tokens' norm, with commas.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
) -> None:
    """Measure whether features detect concepts and steer images, against dense and random directions."""
    import dataclasses

    from imgdit.benchmarks.unlearning import steering
    from imgdit.benchmarks.unlearning.steering_page import verdict, write_page
    from imgdit.checkpoints import SCENE_PROBE

    with at_work():
        changed: dict[str, Any] = {
            "concepts": concepts and tuple(concepts.split(",")),
            "prompts": prompts,
            "images": images,
            "strengths": strengths and tuple(float(one) for one in strengths.split(",")),
            "steps": steps,
        }
        plan = steering.QUICK if quick else steering.SteeringPlan()
        plan = dataclasses.replace(plan, **{name: value for name, value in changed.items() if value is not None})
        model = model_folder(model)
        result = steering.run(model, probe or SCENE_PROBE, saes or model / "sae", out, plan)
        page = write_page(out, result)
    for line in verdict(result):
        typer.echo(line)
    typer.echo(f"wrote {page}")


@app.command()
def language(
    out: Annotated[Path, typer.Option(help="Folder of the runs and raw numbers; a run goes on there.")] = Path(
        "outputs/bench-language"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Of each model, and of the pre-training of embeddings.")] = 2000,
    contrastive: Annotated[int, typer.Option(min=1, help="Contrastive steps of embeddings.")] = 400,
    captions: Annotated[int, typer.Option(min=1, help="Held-out captions that are measured.")] = 512,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the masks for each caption.")] = 8,
    only: Annotated[str | None, typer.Option(help="blocks or embeddings; both by default.")] = None,
) -> None:
    """Train and compare language models of captions: perplexity by block size, recall of embeddings."""
    from imgdit.benchmarks.scenes import language as bench
    from imgdit.benchmarks.scenes.run import table
    from imgdit.naming import check_choice

    with at_work():
        check_choice("--only", only, (None, "blocks", "embeddings"))
        if only != "embeddings":
            typer.echo(table(bench.block_size_scores(out, steps, captions, draws)))
        if only != "blocks":
            typer.echo(table(bench.embedding_scores(out, steps, contrastive, captions)))
    typer.echo(f"wrote {out}")


@app.command()
def training(
    probe: Probe = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and raw numbers; a run goes on there.")] = Path(
        "outputs/bench-training"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Four steps of a small model, to see that rows run.")] = False,
    steps: Annotated[int | None, typer.Option(min=5, help="Training steps of each row.")] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Training scenes, rendered once for all rows.")] = None,
    tokens: Annotated[int | None, typer.Option(min=256, help="Image tokens of a step.")] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Images of each kind that are measured.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and noise.")] = None,
    only: Annotated[str | None, typer.Option(help="Rows with commas between them; all by default.")] = None,
) -> None:
    """Train the embedded model's backbone with one change per row, and compare: losses, and a small bench."""
    import dataclasses

    from imgdit.benchmarks.scenes import ablation
    from imgdit.checkpoints import SCENE_PROBE

    changed: dict[str, Any] = {"steps": steps, "scenes": scenes, "tokens": tokens, "count": count, "seed": seed}
    plan = ablation.QUICK if quick else ablation.AblationPlan()
    with at_work():
        plan = dataclasses.replace(plan, **{name: value for name, value in changed.items() if value is not None})
        rows = [name.strip() for name in (only or "").split(",") if name.strip()]
        found = ablation.run(probe or SCENE_PROBE, out, plan, rows, typer.echo)
    typer.echo(ablation.table(found))
    typer.echo(f"wrote {out}/training.json")


@app.command("text-encoders")
def text_encoders(
    probe: Probe = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and raw numbers; a run goes on there.")] = Path(
        "outputs/bench-text-encoders"
    ),
    contrastive: Annotated[int, typer.Option(min=1, help="Contrastive steps of each encoder.")] = 400,
    captions: Annotated[int, typer.Option(min=64, help="Captions to which the reading layers are fitted.")] = 1024,
    count: Annotated[int, typer.Option(min=2, help="Images of two objects for each encoder.")] = 32,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
) -> None:
    """Compare a masked language model with a T5 encoder of equal size as text encoders of the embedded model.

    Only the layers that read the text are fitted to each encoder; the image model stays.
    """
    from imgdit.benchmarks.scenes.run import table
    from imgdit.benchmarks.scenes.text_encoders import encoder_scores
    from imgdit.checkpoints import SCENE_PROBE

    with at_work():
        scores = encoder_scores(out, probe or SCENE_PROBE, contrastive, captions, count, steps, guidance)
    typer.echo(table(scores))
    typer.echo(f"wrote {out}")


@app.command("unlearn-canvas")
def unlearn_canvas(
    folder: Annotated[Path, typer.Argument(help="A folder per target with <style>_<object>_seed<number>.jpg.")],
    style_classifier: Annotated[
        str,
        typer.Option(help="Folder or Hub id of a transformers classifier or a model that answers questions."),
    ],
    object_classifier: Annotated[str, typer.Option(help="The same for objects.")],
    out: Annotated[Path | None, typer.Option(help="File of the raw counts.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder that keeps what the classifiers said, to go on.")] = None,
    engine: Annotated[str, typer.Option(help="With --labels: local, or ray for several processes.")] = "local",
    workers: Workers = 1,
) -> None:
    """Score images in UnlearnCanvas' own layout with given classifiers."""
    from imgdit.benchmarks.unlearning import canvas

    with user_errors():
        if labels is None and engine != "local":
            raise ValueError(f"--engine {engine} needs --labels, a folder for what the workers find")
        result = canvas.run(folder, style_classifier, object_classifier, labels, engine=engine, workers=workers)
    typer.echo(canvas.table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        typer.echo(f"wrote {out}")


app.add_typer(speed.app)
