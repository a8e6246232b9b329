"""`imgdit bench`: measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure: what a model makes, and how fast (speed as ratios within one run).", no_args_is_help=True
)


@app.command()
def scenes(
    model: Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Folder of a probe; the embedded one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the raw numbers and the sheets.")] = Path(
        "outputs/bench-scenes"
    ),
    count: Annotated[int, typer.Option(min=1, help="Pictures of each kind.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 28,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale.")] = 3.0,
) -> None:
    """Measure a model of the scenes against exact ground truth: text, depth, edges, segmentation, views, time."""
    from imgdit.apps import scene_bench
    from imgdit.checkpoints import SCENE_PROBE, SCENES

    scores = scene_bench.run(model or SCENES, probe or SCENE_PROBE, out, count, steps, guidance)
    typer.echo(scene_bench.table(scores))
    for name, values in json.loads((out / "scenes.json").read_text())["seconds"].items():
        typer.echo(f"{name}: {min(values):.2f} to {max(values):.2f} s")
    typer.echo(f"wrote {out}")


@app.command("any")
def any_tasks(
    model: Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Folder of a probe; the embedded one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the raw numbers and the sheets.")] = Path("outputs/bench-any"),
    count: Annotated[int, typer.Option(min=1, help="Pictures of each kind.")] = 50,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 28,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale.")] = 3.0,
) -> None:
    """Measure the any-to-any tasks of a model of the scenes: restoring, maps, editing, subjects, views, cameras."""
    from imgdit.apps import scene_bench
    from imgdit.checkpoints import SCENE_PROBE, SCENES

    scores = scene_bench.run_any(model or SCENES, probe or SCENE_PROBE, out, count, steps, guidance)
    typer.echo(scene_bench.table(scores))
    typer.echo(f"wrote {out}")


@app.command()
def control(
    model: Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of the adapters; the model's by default.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Folder of a probe; the embedded one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the raw numbers and the sheets.")] = Path(
        "outputs/bench-control"
    ),
    count: Annotated[int, typer.Option(min=1, help="Pictures of each kind.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 28,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale.")] = 3.0,
) -> None:
    """Measure condition adapters on scenes: are depth, edges, hole and subject obeyed, and the sentence still?"""
    from imgdit.apps import scene_bench
    from imgdit.checkpoints import SCENE_PROBE, SCENES

    model = model or SCENES
    try:
        folder = adapters or model / "adapters"
        scores = scene_bench.run_control(model, folder, probe or SCENE_PROBE, out, count, steps, guidance)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(scene_bench.table(scores))
    typer.echo(f"wrote {out}")


@app.command()
def unlearn(
    model: Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Folder of a probe; the embedded one by default.")] = None,
    saes: Annotated[Path, typer.Option(help="Folder of the autoencoders (`imgdit sae train scenes/sae`).")] = Path(
        "outputs/scenes/sae/saes"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the raw numbers and the pictures; a run goes on there.")] = Path(
        "outputs/bench-unlearn"
    ),
    quick: Annotated[bool, typer.Option(help="Four targets, five methods, two seeds, 12 steps.")] = False,
    methods: Annotated[str | None, typer.Option(help="Names with commas between them.")] = None,
    targets: Annotated[str | None, typer.Option(help="Styles and objects with commas between them.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Pictures of each style with each object.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    sentences: Annotated[int | None, typer.Option(help="For each label, that methods learn from.")] = None,
    tune: Annotated[bool | None, typer.Option(help="Choose each method's settings on other seeds first.")] = None,
    together: Annotated[int | None, typer.Option(help="Seeds for several labels at once; 0: none.")] = None,
    attack: Annotated[int | None, typer.Option(help="Attacked prompts of each of four targets; 0: none.")] = None,
) -> None:
    """Compare ways to unlearn styles and objects: what is gone, what is kept, what it costs."""
    import dataclasses
    from typing import Any

    from imgdit.apps import unlearn_bench
    from imgdit.checkpoints import SCENE_PROBE, SCENES

    changed: dict[str, Any] = {
        "methods": methods and tuple(methods.split(",")),
        "targets": targets and tuple(targets.split(",")),
        "seeds": seeds,
        "steps": steps,
        "sentences": sentences,
        "tune": tune,
        "together": together,
        "attack": attack,
    }
    plan = unlearn_bench.QUICK if quick else unlearn_bench.UnlearnPlan()
    try:
        plan = dataclasses.replace(plan, **{name: value for name, value in changed.items() if value is not None})
        result = unlearn_bench.run(model or SCENES, probe or SCENE_PROBE, saes, out, plan)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(unlearn_bench.table(result))
    typer.echo(f"wrote {out}/unlearn.json")


@app.command("unlearn-canvas")
def unlearn_canvas(
    folder: Annotated[Path, typer.Argument(help="A folder per target with <style>_<object>_seed<number>.jpg.")],
    style_classifier: Annotated[str, typer.Option(help="Folder or Hub repository of a transformers classifier.")],
    object_classifier: Annotated[str, typer.Option(help="The same for objects.")],
    out: Annotated[Path | None, typer.Option(help="File of the raw counts.")] = None,
) -> None:
    """Score pictures in UnlearnCanvas' own layout with given classifiers."""
    from imgdit.apps import canvas_scores

    try:
        result = canvas_scores.run(folder, style_classifier, object_classifier)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(canvas_scores.table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False))
        typer.echo(f"wrote {out}")


@app.command()
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


@app.command("sae-speed")
def sae_speed(
    rounds: Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line instead of a table.")] = False,
) -> None:
    """Time an SAE's training step against dense arithmetic, and its hooks against the block they sit on.

    A ratio of 0.2 is five times as fast; of a hook, a fifth of the block's own time. Runs are interleaved.
    """
    import torch

    from imgdit.evaluation import sae_speed as bench

    torch.set_num_threads(threads)
    if not as_json:
        typer.echo(f"torch {torch.__version__}, {device}, float32, {threads} thread(s)")
        typer.echo(f"{'work':<58}{'against':<36}{'ours':>10}{'other':>10}{'ratio':>8}{'spread':>16}")
    for rows in ([bench.training_comparison(rounds=rounds, device=device)], bench.hook_comparisons(device=device)):
        for row in rows:
            if as_json:
                typer.echo(json.dumps({k: None if v != v else v for k, v in row._asdict().items()}))
            else:
                typer.echo(
                    f"{row.work:<58}{row.against:<36}{row.ours * 1e3:>7.2f} ms{row.other * 1e3:>7.2f} ms"
                    f"{row.ratio:>8.3f}{f'{row.low:.3f}-{row.high:.3f}':>16}"
                )


@app.command("any-speed")
def any_speed(
    rounds: Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line instead of a table.")] = False,
) -> None:
    """Time a step of NextDiT against OneDiffusion's arithmetic done the reference's way: two frames, guidance, a CPU.

    Runs are interleaved; medians, the spread of the pairs and the largest difference of the results are printed.
    """
    import torch

    from imgdit.evaluation.any_speed import any_comparisons

    torch.set_num_threads(threads)
    if not as_json:
        typer.echo(f"torch {torch.__version__}, cpu, float32, {threads} thread(s); against the reference's way")
        typer.echo(f"{'work':<76}{'ours':>10}{'other':>10}{'times faster':>14}{'spread':>12}{'max diff':>10}")
    for row in any_comparisons(rounds=rounds):
        if as_json:
            typer.echo(json.dumps(row._asdict()))
        else:
            typer.echo(
                f"{row.work:<76}{row.ours * 1e3:>7.0f} ms{row.other * 1e3:>7.0f} ms{1 / row.ratio:>14.2f}"
                f"{f'{1 / row.high:.2f}-{1 / row.low:.2f}':>12}{row.difference:>10.1e}"
            )


@app.command("control-speed")
def control_speed(
    rounds: Annotated[int, typer.Option(min=1, help="Counted pairs of steps.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Time steps under conditions against steps without, on a medium FLUX, and their share of the GEMM peak."""
    import torch

    from imgdit.adapters.speed import condition_costs

    torch.set_num_threads(threads)
    element = getattr(torch, dtype, None)
    if not isinstance(element, torch.dtype):
        raise typer.BadParameter(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    typer.echo(f"torch {torch.__version__}, {device}, {dtype}, {threads} thread(s)")
    typer.echo(f"{'work':<42}{'step':>10}{'ratio':>8}{'spread':>16}{'of peak':>9}")
    for row in condition_costs(rounds=rounds, device=device, dtype=element):
        spread = f"{row.low:.3f}-{row.high:.3f}"
        typer.echo(f"{row.work:<42}{row.seconds * 1e3:>7.0f} ms{row.ratio:>8.3f}{spread:>16}{row.share:>8.0%}")
