"""Sweeps of the learning rate over widths: does the best one transfer, and which is it?

A sweep is a folder with one small file per run, so it goes on where it was interrupted, and any number of processes
(`accelerate launch`, machines with a shared disk) may work on it: each makes its own fraction of the runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit.io.atomic import write_text
from imgdit.io.safe_json import read_object
from imgdit.io.text import read_lines
from imgdit.mup.optimum import Curve, curve, loss_at, shift
from imgdit.mup.roles import Parametrisation
from imgdit.training.build import build_model
from imgdit.training.loop import NonFiniteLoss, train
from imgdit.training.recipe import Recipe
from imgdit.training.sources import training_batches
from imgdit.training.widths import PARAMETRISATIONS, at_width, base_width_of

# What tells a process that it is one of several; each of our runs is on its own.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Run(NamedTuple):
    """One training run of a sweep."""

    parametrisation: Parametrisation
    width: int
    log2lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.parametrisation}-width-{self.width}-log2lr{self.log2lr:+g}-seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What is compared."""

    recipe: Recipe
    """`run.steps` long; its learning rate and folder do not count."""
    widths: tuple[int, ...]
    """Ascending."""
    log2lr: tuple[float, ...]
    """Learning rates as powers of 2, ascending."""
    seeds: int
    """Initial weights, orders of the data and noises to average over."""
    folder: Path
    parametrisations: tuple[Parametrisation, ...] = PARAMETRISATIONS
    standard_log2lr: tuple[float, ...] | None = None
    """Learning rates of the standard parametrisation, whose best one falls with the width; `None`: as `log2lr`."""

    def __post_init__(self) -> None:
        rates = {"log2lr": self.log2lr, "standard_log2lr": self.rates("standard")}
        for name, values in ({"widths": self.widths} | rates).items():
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} must ascend without repetition, got {list(values)}")
        for name, values in rates.items():
            if len(values) < 3:
                raise ValueError(f"an optimum needs at least three learning rates, got {name}={list(values)}")
        for run in self.runs():
            self.recipe_of(run)

    def rates(self, parametrisation: Parametrisation) -> tuple[float, ...]:
        """Learning rates of a parametrisation, as powers of 2."""
        own = self.standard_log2lr if parametrisation == "standard" else None
        return self.log2lr if own is None else own

    def runs(self) -> list[Run]:
        """Every run, the longest first; where both parametrisations are the same there is only μP's."""
        wanted = (
            self.stand_in(Run(p, width, log2lr, seed))
            for width in reversed(self.widths)
            for seed in range(self.seeds)
            for log2lr in sorted({*self.log2lr, *self.rates("standard")})
            for p in self.parametrisations
            if log2lr in self.rates(p)
        )
        return list(dict.fromkeys(wanted))

    def stand_in(self, run: Run) -> Run:
        """The run whose result is this one's as well."""
        arguments = self.recipe.model.arguments
        only_width = not {"mup_base_head_dim", "mup_base_depth"} & arguments.keys()
        same = only_width and run.width == self.base_width and "mup" in self.parametrisations
        return run._replace(parametrisation="mup") if same else run

    @property
    def base_width(self) -> int:
        """Width where both parametrisations are the same."""
        return base_width_of(self.recipe, self.widths)

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe of one run: measured once, at its end."""
        steps = self.recipe.run.steps
        quiet = {"evaluate_every": steps, "checkpoint_every": steps, "log_every": steps, "tracker": "none"}
        folder = str(self.folder / "working" / run.name)
        recipe = at_width(self.recipe, run.width, run.parametrisation, self.base_width)
        return recipe.replace(
            run={**quiet, "folder": folder, "seed": self.recipe.run.seed + run.seed, "sample_every": 0},
            optimizer={"lr": 2.0**run.log2lr},
        )


@dataclass(frozen=True)
class Transfer:
    """Result of a sweep."""

    curves: dict[Parametrisation, list[Curve]]
    """A curve per width, the narrowest first."""
    shifts: dict[Parametrisation, float | None]
    """log2 from the narrowest's best learning rate to the widest's; `None`: an optimum is missing."""
    penalties: dict[Parametrisation, float | None]
    """How much more the widest model loses at the narrowest's best rate than at its own, as a fraction."""
    transferred: dict[Parametrisation, list[float] | None]
    """Loss of each width at the narrowest's best rate."""
    wider_is_better: dict[Parametrisation, bool | None]
    """Whether that never rises from one width to the next; `None`: the narrowest has no optimum."""
    proxy_fraction: float
    """Cost of the narrowest width's μP runs as a fraction of one run of the target."""
    sweep_fraction: float
    """Cost of all runs as a fraction of one run of the target."""
    cpu_seconds: float
    """Processor time of all runs."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        curves = {
            name: [
                {
                    "width": c.width,
                    "log2lr": c.log2lr,
                    "loss": [_finite(value) for value in c.loss],
                    "optimum": None if c.optimum is None else c.optimum._asdict(),
                    "refusal": c.refusal,
                    "seeds": c.seeds,
                }
                for c in lines
            ]
            for name, lines in self.curves.items()
        }
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "curves": curves}


def run_sweep(sweep: Sweep, *, jobs: int = 1, progress: Callable[[str], None] = lambda line: None) -> bool:
    """Make this process's share of the missing runs.

    Args:
        sweep: what to run.
        jobs: processes on this machine, beside those of `accelerate launch`.
        progress: is told each finished run.

    Returns:
        Whether the sweep is complete.

    Raises:
        ValueError: the folder holds a sweep of another recipe.
    """
    _claim(sweep)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    missing = [run for run in sweep.runs()[rank::ranks] if not _result(sweep, run).exists()]
    with _alone():
        if jobs == 1:
            for run in missing:
                progress(_run_one(sweep, run))
        else:
            threads = max(torch.get_num_threads() // jobs, 1)
            with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
                for line in pool.map(_run_one, [sweep] * len(missing), missing):
                    progress(line)
    complete = all(_result(sweep, run).exists() for run in sweep.runs())
    if complete:
        shutil.rmtree(sweep.folder / "working", ignore_errors=True)
    return complete


def analyse(sweep: Sweep, target: Recipe | None = None) -> Transfer:
    """Curves, optima and costs of a complete sweep.

    Args:
        sweep: whose runs are all there.
        target: the run that the sweep is to save trials of; `None`: one run of the widest model.
    """
    results = {run: read_object(_result(sweep, run)) for run in sweep.runs()}

    def loss(run: Run) -> float:
        value = results[sweep.stand_in(run)]["loss"]
        return math.inf if value is None else value

    curves: dict[Parametrisation, list[Curve]] = {
        p: [
            curve(
                width,
                {seed: {x: loss(Run(p, width, x, seed)) for x in sweep.rates(p)} for seed in range(sweep.seeds)},
            )
            for width in sweep.widths
        ]
        for p in sweep.parametrisations
    }
    transferred: dict[Parametrisation, list[float] | None] = {}
    penalties: dict[Parametrisation, float | None] = {}
    for p, lines in curves.items():
        first, last = lines[0].optimum, lines[-1].optimum
        transferred[p] = None if first is None else [loss_at(line, first.log2lr) for line in lines]
        at = transferred[p]
        penalties[p] = None if at is None or last is None else at[-1] / last.loss - 1
    costs = {width: _cost(at_width(sweep.recipe, width, "mup", sweep.base_width)) for width in sweep.widths}
    whole = costs[sweep.widths[-1]] if target is None else _cost(target)
    return Transfer(
        curves,
        {p: shift(lines) for p, lines in curves.items()},
        penalties,
        transferred,
        {p: None if at is None else at == sorted(at, reverse=True) for p, at in transferred.items()},
        proxy_fraction=len(sweep.log2lr) * sweep.seeds * costs[sweep.widths[0]] / whole,
        sweep_fraction=sum(costs[run.width] for run in sweep.runs()) / whole,
        cpu_seconds=math.fsum(result["cpu_seconds"] for result in results.values()),
    )


def _cost(recipe: Recipe) -> float:
    """Parameters times samples times steps; the ratio of two is about that of their FLOPs (arXiv 2505.15270)."""
    with torch.device("meta"):
        model = build_model(recipe)
    return sum(p.numel() for p in model.parameters()) * recipe.run.batch_size * recipe.run.steps


def _run_one(sweep: Sweep, run: Run) -> str:
    """Train and write the result; the line to tell."""
    recipe, started, cpu = sweep.recipe_of(run), time.perf_counter(), time.process_time()
    shutil.rmtree(recipe.run.folder, ignore_errors=True)  # of a run that was killed
    batches, held_out = training_batches(recipe)
    loss: float | None = None
    try:
        train(recipe, model=build_model(recipe), batches=batches, held_out=held_out)
        lines = read_lines(Path(recipe.run.folder) / "metrics.jsonl")
        loss = _finite([line["held_out"] for line in map(json.loads, lines) if "held_out" in line][-1])
    except NonFiniteLoss:
        pass  # a learning rate beyond stability is a result, not a failure
    shutil.rmtree(recipe.run.folder)
    values = {"loss": loss, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    write_text(_result(sweep, run), json.dumps({**run._asdict(), **values}))
    return f"{run.name}: {'diverged' if loss is None else f'{loss:.4f}'} ({values['seconds']:.1f} s)"


def _claim(sweep: Sweep) -> None:
    """Note what the folder's runs are of, or refuse a folder of other runs."""
    recipe = sweep.recipe.to_dict()
    own = json.loads(json.dumps({**recipe, "run": {**recipe["run"], "folder": ""}, "base_width": sweep.base_width}))
    path = sweep.folder / "sweep.json"
    if path.exists():
        found = read_object(path)
        changed = [name for name in own if own[name] != found.get(name)]
        if changed:
            raise ValueError(
                f"{sweep.folder} holds runs of another recipe: {', '.join(changed)} differ(s); choose another folder"
            )
    (sweep.folder / "runs").mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(own, indent=1))


def _result(sweep: Sweep, run: Run) -> Path:
    return sweep.folder / "runs" / f"{run.name}.json"


@contextmanager
def _alone() -> Iterator[None]:
    """Hide from accelerate that several processes were launched; each has the GPU of its local rank."""
    before = dict(os.environ)
    if "LOCAL_RANK" in before and torch.cuda.is_available():
        torch.cuda.set_device(int(before["LOCAL_RANK"]))
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", before["LOCAL_RANK"])
    for name in before:
        if name in _LAUNCHED or name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sweep_table(curves: Mapping[Parametrisation, Sequence[Curve]]) -> Iterator[str]:
    """Lines of text: a row per parametrisation and width, a column per learning rate."""
    rates = sorted({rate for lines in curves.values() for c in lines for rate in c.log2lr})
    yield f"{'':<16}" + "".join(f"{x:>9g}" for x in rates) + f"{'best':>9}{'seeds':>18}"
    for name, lines in curves.items():
        for c in lines:
            found = dict(zip(c.log2lr, c.loss))
            shown = ("" if x not in found else f"{found[x]:.4f}" if math.isfinite(found[x]) else "-" for x in rates)
            cells = "".join(f"{value:>9}" for value in shown)
            best = c.refusal if c.optimum is None else f"{c.optimum.log2lr:>9.2f}"
            seeds = f"{f'{min(c.seeds):.2f} to {max(c.seeds):.2f}':>18}" if c.seeds else ""
            yield f"{f'{name} {c.width}':<16}{cells}{best}{seeds}"


def transfer_lines(result: Transfer) -> Iterator[str]:
    """Lines of text: what each parametrisation's best learning rate does over the widths, and what that costs."""
    for name, moved in result.shifts.items():
        lines = result.curves[name]
        span = f"over {lines[-1].width / lines[0].width:g}x the width"
        shown = "?" if moved is None else f"{round(moved, 2) + 0.0:+.2f}"  # no -0.00
        yield f"{name}: the optimum moves by {shown} in log2 {span}"
        at, penalty = result.transferred[name], result.penalties[name]
        if at is None:
            continue
        rate = f"at the best rate of width {lines[0].width}"
        if penalty is not None:
            yield f"{name}: {rate} width {lines[-1].width} loses {penalty:.1%} against its own best"
        losses = ", ".join("diverged" if math.isinf(value) else f"{value:.4f}" for value in at)
        yield f"{name}: {rate} wider is {'never' if result.wider_is_better[name] else 'somewhere'} worse: {losses}"
