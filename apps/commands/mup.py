"""`imgdit mup`: hyper-parameters from small models for large ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.apps.console import at_work, user_errors

app = typer.Typer(help="Tune small, train large: check, sweep and plan under μP.", no_args_is_help=True)

_RECIPE = "A YAML file, or the name of a packaged recipe (scenes/transformer)."
QUICK_WIDTHS, QUICK_LOG2LR, QUICK_SEEDS = (32, 64, 128), tuple(range(-9, -2)), 3
"""The sweep of `imgdit mup transfer --quick`, for the recipe mup/transfer."""


@app.command()
def table(recipe: Annotated[str, typer.Argument(help=_RECIPE)]) -> None:
    """Print the role, initialisation and multipliers of every parameter of a recipe's model."""
    import torch

    from imgdit.mup import mup_table
    from imgdit.training import load_recipe
    from imgdit.training.build import build_model

    with user_errors():
        with torch.device("meta"):
            rules = mup_table(build_model(load_recipe(recipe)))
    longest = max(len(rule.name) for rule in rules)
    typer.echo(f"{'parameter':<{longest}}  {'role':<11}{'shape':<20}{'std':>9}{'lr':>9}{'decay':>9}{'eps':>9}")
    for rule in rules:
        std = "gain" if rule.init_std is None else f"{rule.init_std:.4g}"
        multipliers = "".join(f"{value:>9.4g}" for value in (rule.lr_mult, rule.wd_mult, rule.eps_mult))
        shape = "x".join(map(str, rule.shape))
        typer.echo(f"{rule.name:<{longest}}  {rule.role:<11}{shape:<20}{std:>9}{multipliers}")


@app.command("coord-check")
def coord_check(
    recipe: Annotated[str, typer.Argument(help=_RECIPE)] = "mup/coordinates",
    widths: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "64,128,256,512,1024",
    steps: Annotated[int, typer.Option(min=2, help="Forward passes; an update between two.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Initial weights to average over.")] = 3,
    log2lr: Annotated[float | None, typer.Option(help="log2 of the learning rate, instead of the recipe's.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest slope that passes.")] = 0.15,
    out: Annotated[Path, typer.Option(help="Folder of coordinates.json and .png.")] = Path("outputs/mup/coordinates"),
) -> None:
    """Mean |activation| per module against width, under μP and the standard parametrisation, with slopes.

    Exits with 1 if a slope under μP is steeper than the tolerance, so that it can stand in a CI.
    """
    import dataclasses

    from imgdit.mup.plots import plot_coordinates
    from imgdit.training import load_recipe
    from imgdit.training.coordinate_check import coordinate_check

    with at_work():
        loaded = load_recipe(recipe)
        if log2lr is not None:
            loaded = loaded.replace(optimizer={"lr": 2.0**log2lr})
        checks = coordinate_check(
            loaded,
            _numbers(widths, int, "widths"),
            steps=steps,
            seeds=seeds,
            progress=lambda line: typer.echo(line, err=True),
        )
    mup, standard = checks["mup"], checks["standard"]
    longest = max(map(len, mup.means))
    typer.echo(f"slope of log2 mean|activation| over log2 width, before the first update and in step {steps}")
    typer.echo(f"{'':<{longest}}{'μP':>16}{'standard':>16}")
    for ours, theirs in zip(mup.slopes(), standard.slopes()):
        pairs = "".join(f"{_slope(s.at_start):>8}{_slope(s.at_end):>8}" for s in (ours, theirs))
        typer.echo(f"{ours.module:<{longest}}{pairs}")
    values = {
        name: {**dataclasses.asdict(check), "slopes": [s._asdict() for s in check.slopes()]}
        for name, check in checks.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "coordinates.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    typer.echo(f"wrote {out / 'coordinates.json'} and {plot_coordinates(checks, out / 'coordinates.png')}")
    if beyond := mup.beyond(tolerance):
        worst = max(beyond, key=lambda s: abs(s.at_end or 0.0))
        typer.echo(
            f"{len(beyond)} of {len(mup.means)} slopes are beyond {tolerance}, the steepest {worst.at_end:.3f} of "
            f"{worst.module}",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def transfer(
    recipe: Annotated[str, typer.Argument(help=_RECIPE)] = "mup/transfer",
    widths: Annotated[str | None, typer.Option(help="Widths, separated by commas.")] = None,
    log2lr: Annotated[str | None, typer.Option(help="log2 learning rates: -9,-8,-7 or -9:-3.")] = None,
    standard_log2lr: Annotated[
        str | None, typer.Option(help="Those of the standard parametrisation, whose best falls with the width.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per width and learning rate.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run, instead of the recipe's.")] = None,
    standard: Annotated[bool, typer.Option(help="Run the standard parametrisation beside μP.")] = True,
    quick: Annotated[bool, typer.Option(help="The small sweep of mup/transfer: 3 widths, 7 rates, 3 seeds.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    target: Annotated[str | None, typer.Option(help="Recipe of the run to save trials of (scale/18b).")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep, instead of the recipe's; it goes on there.")
    ] = None,
) -> None:
    """Sweep the learning rate at several widths, and suggest one.

    Several GPUs or machines: `accelerate launch -m imgdit.apps.cli mup transfer …` with a shared folder; each process
    makes its share, and the one that finishes last writes the result.
    """
    from imgdit.mup.plots import plot_curves
    from imgdit.training import load_recipe
    from imgdit.training.transfer import Sweep, analyse, run_sweep, sweep_table, transfer_lines

    if quick:
        if widths is not None or log2lr is not None or standard_log2lr is not None:
            raise typer.BadParameter("--quick brings its own widths and learning rates; leave out one or the other")
        chosen, rates, seeds = QUICK_WIDTHS, QUICK_LOG2LR, QUICK_SEEDS
    elif widths is None or log2lr is None:
        raise typer.BadParameter("give --widths and --log2lr, or --quick for the small sweep of mup/transfer")
    else:
        chosen, rates = _numbers(widths, int, "widths"), _numbers(log2lr, float, "log2lr")
    own = None if standard_log2lr is None else _numbers(standard_log2lr, float, "standard-log2lr")
    with at_work():
        loaded = load_recipe(recipe)
        if steps is not None:
            loaded = loaded.replace(run={"steps": steps})
        out = Path(loaded.run.folder) if out is None else out
        sweep = Sweep(
            loaded, tuple(sorted(chosen)), tuple(sorted(map(float, rates))), seeds, out,
            ("mup", "standard") if standard else ("mup",), None if own is None else tuple(sorted(own)),
        )  # fmt: skip
        wanted = None if target is None else load_recipe(target)
        if not run_sweep(sweep, jobs=jobs, progress=lambda line: typer.echo(line, err=True)):
            typer.echo(f"this process is done; others still work on {out}")
            return
        result = analyse(sweep, wanted)
    for line in sweep_table(result.curves):
        typer.echo(line)
    for line in transfer_lines(result):
        typer.echo(line)
    best = next((c for c in reversed(result.curves["mup"]) if c.optimum is not None), None)
    if best is not None and best.optimum is not None:
        rate, low, high = (2.0**x for x in (best.optimum.log2lr, best.optimum.low, best.optimum.high))
        typer.echo(f"suggested optimizer.lr: {rate:.4g}, within 1 % of the best from {low:.4g} to {high:.4g}")
    whole = target or f"width {sweep.widths[-1]}"
    typer.echo(
        f"cost in runs of {whole}: the narrowest width's μP runs {result.proxy_fraction:.1%}, all runs "
        f"{result.sweep_fraction:.1%}; {result.cpu_seconds:.0f} s of processor time"
    )
    (out / "transfer.json").write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
    typer.echo(f"wrote {out / 'transfer.json'} and {plot_curves(result.curves, out / 'transfer.png')}")


@app.command()
def plan(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes to add up; all of scale/ by default.")] = None,
    target_params: Annotated[float | None, typer.Option(help="Plan a target of this size, such as 5e9.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs of the proxy, with --target-params.")] = 7,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share weights and batch.")] = 64,
    image_tokens: Annotated[int, typer.Option(min=1, help="Of a sample; 1024: 512x512 pixels.")] = 1024,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of a sample.")] = 256,
    teraflops: Annotated[float, typer.Option(min=0.1, help="What a GPU reaches.")] = 400.0,
) -> None:
    """Parameters, memory per GPU and operations per step of recipes, or a proxy for a target; nothing is run.

    The formulas are in docs/mup.md.
    """
    from imgdit.recipes import packaged_recipes
    from imgdit.training import load_recipe
    from imgdit.training.plan import plan, proxy_plan

    options: dict[str, Any] = {
        "image_tokens": image_tokens, "text_tokens": text_tokens, "gpus": gpus, "flops_per_second": teraflops * 1e12,
    }  # fmt: skip
    with user_errors():
        if target_params is not None:
            if recipes and len(recipes) > 1:
                raise typer.BadParameter("--target-params takes one recipe, whose width is changed")
            found = proxy_plan(load_recipe((recipes or ["scale/0.18b"])[0]), target_params, trials, **options)
            plans = [found.target, found.proxy]
        else:
            found = None
            names = recipes or [name for name in packaged_recipes() if name.startswith("scale/")]
            plans = [plan(name, load_recipe(name), **options) for name in names]
    typer.echo(f"{'':<14}{'parameters':>16}{'width':>8}{'memory/GPU':>13}{'FLOPs/step':>13}{'days':>8}  ({gpus} GPUs)")
    for row in sorted(plans, key=lambda row: row.cost.parameters):
        typer.echo(
            f"{row.name:<14}{row.cost.parameters:>16,}{row.cost.width:>8}{row.memory / 1e9:>10.1f} GB"
            f"{row.step_flops:>13.2e}{row.days:>8.2f}"
        )
    if found is not None:
        steps, whole = found.proxy_recipe.run.steps, found.target_recipe.run.steps
        typer.echo(
            f"tune optimizer.lr with {trials} runs of {steps:,} steps at width {found.proxy.cost.width}, then set "
            f"mup_base_width: {found.proxy.cost.width} at width {found.target.cost.width} and train {whole:,} steps; "
            f"all trials cost {found.fraction:.1%} of that run ({trials * found.proxy.days:.2f} days on {gpus} GPUs)"
        )


def _numbers(text: str, kind: type, name: str) -> tuple:
    """Numbers of "1,2,3" or, whole ones, of "1:3"."""
    try:
        if ":" in text:
            first, last = map(int, text.split(":"))
            return tuple(map(kind, range(first, last + 1)))
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--{name} takes numbers such as 64,128 or a range such as -9:-3, got {text!r}"
        ) from None


def _slope(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
