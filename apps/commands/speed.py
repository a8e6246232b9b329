"""`imgdit bench`: how fast, as ratios within one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from imgdit.apps.commands.options import ModelFolder, model_folder
from imgdit.apps.console import at_work, user_errors
from imgdit.defaults import STEPS
from imgdit.naming import check_name

app = typer.Typer()

Rounds = Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line instead of a table.")]


def _print_rows(rows: Iterable[Any], as_json: bool, line: Callable[[Any], str]) -> None:
    """Print named tuples as they come; JSON has no NaN."""
    for row in rows:
        values = {name: None if value != value else value for name, value in row._asdict().items()}
        typer.echo(json.dumps(values) if as_json else line(row))


@app.command()
def forward(
    rounds: Rounds = 9,
    threads: Threads = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Time MMDiT's forward pass against diffusers' FLUX and SD3 transformers, and its modulation per frame.

    Ratios below 1 mean that ours is faster. Runs are interleaved; medians and the spread of the pairs are printed.
    """
    import torch

    from imgdit.benchmarks.speed import timing as speed

    torch.set_num_threads(threads)
    if not as_json:
        peak = speed.gemm_peak(device=device, dtype=getattr(torch, dtype))
        typer.echo(
            f"torch {torch.__version__}, {device}, {dtype}, {threads} thread(s); torch.mm {peak / 1e9:.0f} GFLOP/s"
        )
        typer.echo(f"{'work':<44}{'against':<26}{'ours':>9}{'other':>9}{'ratio':>8}{'spread':>16}{'max diff':>10}")
    rows = speed.forward_comparisons(rounds=rounds, device=device, dtype=getattr(torch, dtype))
    _print_rows(
        rows,
        as_json,
        lambda row: (
            f"{row.work:<44}{row.against:<26}{row.ours * 1e3:>6.1f} ms{row.other * 1e3:>6.1f} ms{row.ratio:>8.3f}"
            f"{f'{row.low:.3f}-{row.high:.3f}':>16}{row.difference:>10.1e}"
        ),
    )


@app.command("sae-speed")
def sae_speed(
    rounds: Rounds = 9,
    threads: Threads = 1,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time an SAE's training step against dense arithmetic, and its hooks against the block they sit on.

    A ratio of 0.2 is five times as fast; of a hook, a fifth of the block's own time. Runs are interleaved.
    """
    import torch

    from imgdit.benchmarks.speed import sae as bench

    torch.set_num_threads(threads)
    if not as_json:
        typer.echo(f"torch {torch.__version__}, {device}, float32, {threads} thread(s)")
        typer.echo(f"{'work':<58}{'against':<36}{'ours':>10}{'other':>10}{'ratio':>8}{'spread':>16}")
    step = bench.training_comparison(rounds=rounds, device=device)
    rows = chain([step], bench.hook_comparisons(device=device))
    _print_rows(
        rows,
        as_json,
        lambda row: (
            f"{row.work:<58}{row.against:<36}{row.ours * 1e3:>7.2f} ms{row.other * 1e3:>7.2f} ms"
            f"{row.ratio:>8.3f}{f'{row.low:.3f}-{row.high:.3f}':>16}"
        ),
    )


@app.command("any-speed")
def any_speed(
    rounds: Rounds = 9,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Time a step of NextDiT against OneDiffusion's arithmetic done the reference's way: two frames, guidance, a CPU.

    Runs are interleaved; medians, the spread of the pairs and the largest difference of the results are printed.
    """
    import torch

    from imgdit.benchmarks.speed.any_to_any import any_comparisons

    torch.set_num_threads(threads)
    if not as_json:
        typer.echo(f"torch {torch.__version__}, cpu, float32, {threads} thread(s); against the reference's way")
        typer.echo(f"{'work':<76}{'ours':>10}{'other':>10}{'times faster':>14}{'spread':>12}{'max diff':>10}")
    _print_rows(
        any_comparisons(rounds=rounds),
        as_json,
        lambda row: (
            f"{row.work:<76}{row.ours * 1e3:>7.0f} ms{row.other * 1e3:>7.0f} ms{1 / row.ratio:>14.2f}"
            f"{f'{1 / row.high:.2f}-{1 / row.low:.2f}':>12}{row.difference:>10.1e}"
        ),
    )


@app.command("answer-speed")
def answer_speed(
    rounds: Rounds = 3,
    threads: Threads = 1,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time answers about an image with a cached prompt and with half the steps on a shifted schedule against neither.

    The model is new, with 832 prompt and 32 answer tokens. Runs are interleaved.
    """
    import torch

    from imgdit.benchmarks.speed.answers import answer_comparisons

    torch.set_num_threads(threads)
    if not as_json:
        typer.echo(f"torch {torch.__version__}, {device}, float32, {threads} thread(s); against neither")
        typer.echo(f"{'work':<44}{'seconds':>10}{'neither':>10}{'times faster':>14}{'spread':>14}")
    _print_rows(
        answer_comparisons(rounds=rounds, device=device),
        as_json,
        lambda row: (
            f"{row.work:<44}{row.ours:>8.2f} s{row.other:>8.2f} s{1 / row.ratio:>14.2f}"
            f"{f'{1 / row.high:.2f}-{1 / row.low:.2f}':>14}"
        ),
    )


@app.command("write-speed")
def write_speed(
    out: Annotated[Path, typer.Option(help="Folder of the model's run, which goes on there.")] = Path(
        "outputs/bench-write-speed"
    ),
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of the model on rows of captions; 0.6 to 0.8 s each.")
    ] = 1200,
    plain: Annotated[
        bool, typer.Option("--plain/--paraphrases", help="One caption for one meaning, or any paraphrase of it.")
    ] = True,
    rounds: Rounds = 1,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Time text by masked diffusion with caches and a threshold against the published loop, and block diffusion with
    its cache against without.

    The model is the packaged one of captions, trained on rows of many, at width 768 with 8 layers; 128 prompt and 256
    new tokens in blocks of 32, on the CPU. What a threshold saves depends on how certain the model is: on its steps,
    and on how much its captions leave open.
    """
    import torch

    from imgdit.benchmarks.speed import writing as bench

    torch.set_num_threads(threads)
    with at_work():
        model = bench.trained_writer(bench.writer_recipe(out, steps, plain=plain))
    if not as_json:
        typer.echo(f"torch {torch.__version__}, cpu, float32, {threads} thread(s)")
        typer.echo(
            f"{'way':<28}{'against':<34}{'per token':>12}{'times faster':>14}{'spread':>14}{'passes':>8}{'agree':>8}"
        )
    wide = bench.widened(model, bench.WIDTH, bench.LAYERS, bench.HEADS, bench.PROMPT + bench.NEW)
    _print_rows(
        chain(
            bench.writing_comparisons(wide, rounds=rounds, plain=plain),
            (bench.block_writing_comparison(rounds=rounds) for _ in range(1)),  # after the others were told
        ),
        as_json,
        lambda row: (
            f"{row.way:<28}{row.against:<34}{row.seconds * 1e3:>9.1f} ms{row.faster:>14.2f}"
            f"{f'{row.low:.2f}-{row.high:.2f}':>14}{row.passes:>8}{row.agreement:>8.3f}"
        ),
    )


@app.command("live")
def live_speed(
    model: ModelFolder = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each stroke.")] = 10.0,
    rounds: Rounds = 3,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Count images that follow a stroke by the few-step LoRA, and time the delay to the image that shows it.

    Images of 28 guided steps are timed in turn with those of few.
    """
    import torch

    from imgdit.benchmarks.speed.live import live_rates

    torch.set_num_threads(threads)
    with user_errors():
        folder = model_folder(model)
        if not as_json:
            typer.echo(f"torch {torch.__version__}, cpu, {threads} thread(s), {seconds:g} s of each stroke")
            typer.echo(
                f"{'follows':<10}{'images/s':>10}{'delay':>10}{'95 %':>10}{'left out':>10}{'28 steps take':>15}"
            )
        _print_rows(
            live_rates(folder, seconds, rounds),
            as_json,
            lambda row: (
                f"{row.follows:<10}{row.images_per_second:>10.2f}{row.delay:>8.2f} s{row.delay_95:>8.2f} s"
                f"{row.left_out:>10.0%}{row.ratio:>8.1f} times"
            ),
        )


@app.command("control-speed")
def control_speed(
    rounds: Rounds = 9,
    threads: Threads = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Time steps under conditions against steps without, on a medium FLUX, and their fraction of the GEMM peak."""
    import torch

    from imgdit.benchmarks.speed.conditions import condition_costs

    torch.set_num_threads(threads)
    typer.echo(f"torch {torch.__version__}, {device}, {dtype}, {threads} thread(s)")
    typer.echo(f"{'work':<42}{'step':>10}{'ratio':>8}{'spread':>16}{'of peak':>9}")
    for row in condition_costs(rounds=rounds, device=device, dtype=getattr(torch, dtype)):
        spread = f"{row.low:.3f}-{row.high:.3f}"
        typer.echo(f"{row.work:<42}{row.seconds * 1e3:>7.0f} ms{row.ratio:>8.3f}{spread:>16}{row.fraction:>8.0%}")


def _chosen(option: str, names: str, known: Iterable[str]) -> list[str]:
    """Names with commas between them, of those that are known."""
    chosen = names.split(",")
    for name in chosen:
        try:
            check_name("row", name, known)
        except ValueError as error:
            raise typer.BadParameter(f"{option}: {error}") from error
    return chosen


@app.command("speed")
def all_speed(
    only: Annotated[str | None, typer.Option(help="Groups of rows with commas between them; all by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")] = 5,
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="File of the raw numbers.")] = Path("outputs/bench-speed.json"),
) -> None:
    """Time everything against what one would use instead, beside what it must reach: one table, on a CPU.

    Groups: forward, conditions, families, frames, packing, image, sae, training, start. Process time, in pairs.
    """
    import torch

    from imgdit.benchmarks.speed import command_line as bench

    groups = list(bench.GROUPS) if only is None else _chosen("--only", only, bench.GROUPS)
    torch.set_num_threads(threads)
    about = bench.machine()
    typer.echo(", ".join(f"{name} {value}" for name, value in about.items()) + "\n\n" + bench.HEAD)
    rows = []
    for row in bench.run(groups, rounds):
        rows.append(row)
        typer.echo(bench.line(row))
        bench.write(out, rows, about)
    typer.echo(f"\nwrote {out}")


@app.command()
def caches(
    model: ModelFolder = None,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = STEPS,
    rounds: Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")] = 3,
    threads: Threads = 1,
) -> None:
    """What diffusers' step caches save, and how far their images are from those without: held-out scenes."""
    import torch

    from imgdit.benchmarks.speed import pipeline as bench

    torch.set_num_threads(threads)
    with at_work():
        pipe = bench.load(model_folder(model))
    typer.echo("| cache | time | spread | PSNR | SSIM |\n|---|---|---|---|---|")
    for row in bench.cache_table(pipe, count=count, steps=steps, rounds=rounds):
        spread = f"{row.low:.2f} - {row.high:.2f}"
        typer.echo(f"| {row.cache} | {row.ratio:.2f} x | {spread} | {row.psnr:.1f} dB | {row.ssim:.3f} |")


@app.command()
def growth(
    out: Annotated[Path, typer.Option(help="Folder of growth.json and growth.png.")] = Path("outputs/bench-growth"),
    rounds: Annotated[int, typer.Option(min=1, help="Counted steps of each size.")] = 3,
    threads: Threads = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    tiny: Annotated[bool, typer.Option(help="The two smallest sizes of each axis.")] = False,
) -> None:
    """How time and memory of a step grow with tokens, frames, conditions, batch and width, beside the formulas.

    An exponent of at most 1 says: no faster than the formula.
    """
    import torch

    from imgdit.benchmarks.speed import growth as bench

    torch.set_num_threads(threads)
    points = []
    sizes = bench.TINY if tiny else bench.AXES
    for point in bench.measure(sizes, rounds=rounds, device=device, dtype=getattr(torch, dtype)):
        points.append(point)
        typer.echo(
            f"{point.work:<14}{point.axis:<12}{point.value:>6}{point.seconds * 1e3:>10.1f} ms"
            f"{point.flops / 1e9:>9.2f} GFLOP{point.memory / 2**20:>9.1f} MiB"
        )
    found = bench.growth(points)
    typer.echo("\n| work | axis | time over FLOP, exponent | memory over its formula, exponent |\n|---|---|---|---|")
    for line in found:
        typer.echo(f"| {line.work} | {line.axis} | {line.time:.2f} | {line.memory:.2f} |")
    out.mkdir(parents=True, exist_ok=True)
    raw = {"points": [point._asdict() for point in points], "exponents": [line._asdict() for line in found]}
    (out / "growth.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    typer.echo(f"wrote {out / 'growth.json'} and {bench.plot(points, out / 'growth.png')}")


@app.command("large-speed")
def large_speed(
    device: Device = "cuda",
    dtype: Dtype = "bfloat16",
    backends: Annotated[str, typer.Option(help="Of attention, diffusers' names.")] = "native,flash,xformers",
    variants: Annotated[str, typer.Option(help="Of eager, compiled and CUDA graphs.")] = "eager,compiled,CUDA graphs",
    compiler: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
    rounds: Rounds = 9,
    tiny: Annotated[bool, typer.Option(help="A tiny model, to see that everything runs.")] = False,
    as_json: Json = False,
) -> None:
    """Time a 1.4 B MMDiT at 1024 x 1024 on a GPU: 0, 1 and 2 conditions, attention backends, compilers."""
    import torch

    from imgdit.benchmarks.speed import large as bench

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; --device cpu --tiny shows that the command runs")
    chosen: Any = _chosen("--variants", variants, ("eager", "compiled", "CUDA graphs"))
    if not as_json:
        typer.echo("| work | variant | attention | step | against | ratio | spread | TFLOP/s | of peak | recompiled |")
        typer.echo("|---|---|---|---|---|---|---|---|---|---|")
    rows = bench.large_costs(
        bench.TINY if tiny else bench.LARGE,
        device=device,
        dtype=getattr(torch, dtype),
        backends=backends.split(","),
        variants=chosen,
        compiler=compiler,
        rounds=rounds,
    )
    _print_rows(
        rows,
        as_json,
        lambda row: (
            f"| {row.work} | {row.variant} | {row.backend} | {row.seconds * 1e3:.1f} ms | {row.against} "
            f"| {row.ratio:.3f} | {row.low:.3f} - {row.high:.3f} | {row.flops / 1e12:.1f} | {row.fraction:.0%} "
            f"| {row.recompiled} |"
        ),
    )


@app.command("gpu")
def gpu(
    out: Annotated[Path, typer.Option(help="Folder of a JSON file per piece.")] = Path("outputs/bench-gpu"),
    only: Annotated[str | None, typer.Option(help="Pieces with commas between them; all by default.")] = None,
    tests: Annotated[Path | None, typer.Option(help="File of tests to run first.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="No piece begins later.")] = 9.0,
    again: Annotated[bool, typer.Option(help="Measure what the folder holds anew.")] = False,
    rounds: Rounds = 5,
    device: Device = "cuda",
    dtype: Dtype = "bfloat16",
    compiler: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
    tiny: Annotated[bool, typer.Option(help="Tiny models, to see that everything runs.")] = False,
) -> None:
    """Measure on a GPU, at 1024 x 1024: shapes of FLUX.1, FLUX.2 klein and MMDiT against the stock models.

    Forward and training steps with 0, 1 and 2 conditions, joint and cached, a LoRA loaded, compiled, offloaded, with
    an SAE; memory; the embedded model's training. Call it again to run the pieces that are missing or failed.
    """
    import torch

    from imgdit.benchmarks.speed import gpu as bench
    from imgdit.benchmarks.speed.shapes import Machine

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; --device cpu --tiny shows that the command runs")
    names = list(bench.PIECES) if only is None else _chosen("--only", only, bench.PIECES)
    if again:
        for name in names:
            (out / f"{name}.json").unlink(missing_ok=True)
    job = bench.Job(Machine(torch.device(device), getattr(torch, dtype), rounds, compiler), tiny, tests)
    try:
        states = bench.run(job, out, names, minutes=minutes, say=typer.echo)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo("\n" + bench.HEAD)
    for row in bench.collect(out):
        typer.echo(bench.line(row))
    failed = [name for name, state in states.items() if state not in ("there", "done")]
    typer.echo(f"\nwrote {bench.write(out)}" + (f"; run it again for {', '.join(failed)}" if failed else ""))
    if failed:
        raise typer.Exit(1)
