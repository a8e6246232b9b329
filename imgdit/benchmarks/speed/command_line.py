"""`imgdit bench speed`: every claim about speed in one run, as ratios with their spread, beside what it must reach."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from imgdit import DiffusionPipeline
from imgdit.benchmarks.speed import families
from imgdit.benchmarks.speed import sae as sae_speed
from imgdit.benchmarks.speed import timing as speed
from imgdit.benchmarks.speed.conditions import condition_costs
from imgdit.benchmarks.speed.pipeline import image_comparison, load
from imgdit.benchmarks.speed.timing import Comparison
from imgdit.benchmarks.speed.training import training_cost
from imgdit.checkpoints import SCENES
from imgdit.models.mmdit import MMDiT


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    against: str
    """What a person would use instead; "" where the number stands for itself."""
    value: float
    """Median."""
    low: float
    high: float
    unit: str
    """"x": time over that of `against`; "x bytes": peak memory over its; "s": seconds; "of GEMM": floating-point
    operations per second over those of a product of 2048 x 2048 in the same run."""
    bar: float | None = None
    ours: float | None = None
    """Seconds."""
    other: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; `None` without one. Only of GEMM's peak more is better."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.unit == "of GEMM" else self.value <= self.bar


def ratio_row(row: Comparison, bar: float | None) -> Row:
    """A comparison as a line of the table."""
    return Row(row.work, row.against, row.ratio, row.low, row.high, "x", bar, row.ours, row.other)


def _forward(rounds: int) -> Iterator[Row]:
    flux, inputs = speed.medium_flux()
    model = MMDiT.from_diffusers(flux)
    work = speed.flops_of(lambda: model(**inputs))
    for row, bar in zip(speed.forward_comparisons(rounds=rounds), (0.95, None, 0.95), strict=True):
        yield ratio_row(row, bar)
        if bar is not None and row.against.startswith("Flux"):
            for name, peak in speed.gemm_peaks().items():
                fraction = work / row.ours / peak
                bar_of = 0.88 if name == "torch.mm" else None
                work_of = f"{row.work}, fraction of {name}"
                yield Row(work_of, "", fraction, fraction, fraction, "of GEMM", bar_of, row.ours)


def _frames(rounds: int) -> Iterator[Row]:
    yield ratio_row(speed.mixed_noise_comparison(rounds=rounds), 1.02)


def _packing(rounds: int) -> Iterator[Row]:
    yield ratio_row(speed.packing_comparison(load(SCENES).transformer, rounds=rounds), 0.7)


_CONDITION_BARS = {
    "no condition, 2 LoRA loaded": 1.02,
    "1 condition, joint": 1.95,
    "1 condition, independent, cached steps": 1.08,
}


def _conditions(rounds: int) -> Iterator[Row]:
    for cost in condition_costs(rounds=rounds):
        bar = _CONDITION_BARS.get(cost.work)
        yield Row(cost.work, cost.against, cost.ratio, cost.low, cost.high, "x", bar, cost.seconds, cost.other)
        fraction = (cost.fraction, cost.fraction, cost.fraction)
        if cost.work == "1 condition, joint":
            yield Row(f"{cost.work}, fraction of torch.mm", "", *fraction, "of GEMM", 0.85, cost.seconds)


def _families(rounds: int) -> Iterator[Row]:
    for row in families.family_costs(rounds=rounds):
        yield ratio_row(row, families.BARS[row.work.partition(": ")[2]])


_HOOK_BARS = {"exact delta, 10 % of the tokens show the concept": 0.3, "learned threshold": 0.03}


def _sae(rounds: int) -> Iterator[Row]:
    yield ratio_row(sae_speed.training_comparison(rounds=rounds), 0.2)
    for row in sae_speed.hook_comparisons(rounds=rounds):
        yield ratio_row(row, _HOOK_BARS.get(row.work))


def _image(rounds: int) -> Iterator[Row]:
    yield ratio_row(image_comparison(load(SCENES), rounds=rounds), 0.9)


def _training(rounds: int) -> Iterator[Row]:
    cost = training_cost(load(SCENES).transformer, rounds=rounds)
    yield ratio_row(cost.time, 1.0)
    memory = (cost.memory, cost.memory, cost.memory)
    yield Row(f"{cost.time.work}, peak memory", cost.time.against, *memory, "x bytes", 1.0)


def _start(rounds: int) -> Iterator[Row]:
    for work, arguments, bar in (
        ("import imgdit", ["-c", "import imgdit"], 0.3),
        ("imgdit --help", ["-m", "imgdit.apps.cli", "--help"], 0.5),
    ):
        command = [sys.executable, *arguments]
        yield seconds_row(work, partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True), rounds, bar)
    yield seconds_row("load the embedded model", lambda: DiffusionPipeline.from_pretrained(SCENES), rounds, 1.0)


def seconds_row(work: str, call: Callable[[], Any], rounds: int, bar: float) -> Row:
    """Process time of a call and of the processes that it starts, after one that is not counted."""
    call()
    seconds = []
    for _ in range(rounds):
        started = _process_seconds()
        call()
        seconds.append(_process_seconds() - started)
    return Row(work, "", statistics.median(seconds), min(seconds), max(seconds), "s", bar)


def _process_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


GROUPS: dict[str, Callable[[int], Iterator[Row]]] = {
    "forward": _forward,
    "conditions": _conditions,
    "families": _families,
    "frames": _frames,
    "packing": _packing,
    "image": _image,
    "sae": _sae,
    "training": _training,
    "start": _start,
}


def run(groups: Iterable[str], rounds: int) -> Iterator[Row]:
    """The rows of some groups, of `GROUPS`, on a CPU in float32."""
    for name in groups:
        yield from GROUPS[name](rounds)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    import diffusers

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


HEAD = "| work | against | ours | other | measured | spread | must reach | |\n|---|---|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A row of the Markdown table under `HEAD`."""
    sign = "≥" if row.unit == "of GEMM" else "≤"
    bar = "" if row.bar is None else f"{sign} {_number(row.bar, row.unit)}"
    spread = "" if row.low == row.high else f"{_number(row.low, '')} - {_number(row.high, '')}"
    cells = [row.work, row.against, _milliseconds(row.ours), _milliseconds(row.other)]
    cells += [_number(row.value, row.unit), spread, bar, {None: "", True: "met", False: "missed"}[row.met]]
    return "| " + " | ".join(cells) + " |"


def _number(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "of GEMM" else f"{value:.3f}{unit and f' {unit}'}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.{max(0, 2 - int(math.log10(max(seconds * 1e3, 1))))}f} ms"


def write(path: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """The raw numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": about, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
