"""`imgdit bench`: how fast, as ratios within one run."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

app = typer.Typer()

Rounds = Annotated[int, typer.Option(min=1, help="Counted pairs of runs.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line instead of a table.")]


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

    from imgdit.evaluation import speed

    torch.set_num_threads(threads)
    if not as_json:
        peak = speed.gemm_peak(device=device, dtype=getattr(torch, dtype))
        typer.echo(f"torch {torch.__version__}, {device}, {dtype}, {threads} thread(s); GEMM {peak / 1e9:.0f} GFLOP/s")
        typer.echo(f"{'work':<44}{'against':<26}{'ours':>9}{'other':>9}{'ratio':>8}{'spread':>16}{'max diff':>10}")
    for row in speed.forward_comparisons(rounds=rounds, device=device, dtype=getattr(torch, dtype)):
        if as_json:
            typer.echo(json.dumps(row._asdict()))
        else:
            typer.echo(
                f"{row.work:<44}{row.against:<26}{row.ours * 1e3:>6.1f} ms{row.other * 1e3:>6.1f} ms{row.ratio:>8.3f}"
                f"{f'{row.low:.3f}-{row.high:.3f}':>16}{row.difference:>10.1e}"
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
    rounds: Rounds = 9,
    threads: Threads = 1,
    as_json: Json = False,
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
    rounds: Rounds = 9,
    threads: Threads = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Time steps under conditions against steps without, on a medium FLUX, and their share of the GEMM peak."""
    import torch

    from imgdit.adapters.speed import condition_costs

    torch.set_num_threads(threads)
    typer.echo(f"torch {torch.__version__}, {device}, {dtype}, {threads} thread(s)")
    typer.echo(f"{'work':<42}{'step':>10}{'ratio':>8}{'spread':>16}{'of peak':>9}")
    for row in condition_costs(rounds=rounds, device=device, dtype=getattr(torch, dtype)):
        spread = f"{row.low:.3f}-{row.high:.3f}"
        typer.echo(f"{row.work:<42}{row.seconds * 1e3:>7.0f} ms{row.ratio:>8.3f}{spread:>16}{row.share:>8.0%}")
