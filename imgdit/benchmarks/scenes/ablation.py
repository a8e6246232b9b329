"""Ablation of a backbone's training: one change per row, the same seed, data and steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgdit import DiffusionPipeline
from imgdit.benchmarks.scenes.maker import PipelineMaker
from imgdit.benchmarks.scenes.text_to_image import Score, condition_scores, text_scores
from imgdit.checkpoints import SCENES
from imgdit.io.atomic import write_text
from imgdit.io.safe_json import parse_object, read_object
from imgdit.io.text import read_lines
from imgdit.naming import check_name
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.scenes.probe import SceneProbe
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model, build_scheduler
from imgdit.training.recipe import Recipe
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained

_HALF = {"model.arguments.num_attention_heads": 4, "optimizer.weight_decay": 0.1}

ROWS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "feature-alignment": {"objective.name": "feature_alignment"},
    "self-flow": {"objective.name": "self_flow"},
    "map-alignment": {
        "objective.name": "imgdit.scenes.map_alignment:map_alignment",
        "data.arguments.maps": True,
    },
    "muon": {"optimizer.kind": "muon"},
    "muon-half-rate": {"optimizer.kind": "muon", "optimizer.muon_lr": 0.01},
    "half-width": _HALF,
    "half-width-decay-0.5": {**_HALF, "model.arguments.mup_wd_exponent": 0.5},
    "no-prompt-dropout": {"objective.arguments.text_dropout": 0.0},
    "prompt-dropout-0.2": {"objective.arguments.text_dropout": 0.2},
    "levels-0-1": {"objective.arguments.mean": 0.0, "objective.arguments.std": 1.0},
    "levels-uniform": {"objective.arguments.distribution": "uniform"},
}
"""Fields of the recipe scenes/ablation that each row changes. The exponent of weight decay (arXiv 2510.15262) acts at
widths that are not the base width alone, so it is compared at half the width, with ten times the decay."""

METRICS = {
    "object": ("text → image, one object", "object right"),
    "colour": ("text → image, one object", "colour right"),
    "style": ("text → image, one object", "style right"),
    "two objects": ("text → image, two objects", "both objects right, each at its side"),
    "depth AbsRel": ("image → depth", "AbsRel"),
    "mIoU": ("image → segmentation", "mIoU"),
}
"""Columns of the table, by task and metric of the scores."""


@dataclass(frozen=True)
class AblationPlan:
    """How long, and how much is measured."""

    steps: int = 2000
    """Of each row."""
    scenes: int = 2048
    """Training scenes."""
    tokens: int = 2048
    """Image tokens of a step."""
    count: int = 50
    """Images of each kind that are measured."""
    sampler_steps: int = 28
    guidance: float = 3.0
    seed: int = 0
    """Of weights, order and noise."""
    changes: Mapping[str, Any] | None = None
    """Fields of the recipe to change in every row; `None`: none."""


QUICK = AblationPlan(
    steps=4,
    scenes=1,
    tokens=256,
    count=2,
    sampler_steps=2,
    changes={
        "model.arguments.num_layers": 1,
        "model.arguments.num_single_layers": 2,
        "model.arguments.mup_base_width": 128,
        "model.arguments.num_attention_heads": 4,
        "run.mixed_precision": "no",
        "data.arguments.size": 64,
    },
)
"""Seconds per row, to see that every row runs; its numbers say nothing."""


def row_recipe(name: str, out: Path, plan: AblationPlan) -> Recipe:
    """The recipe of a row.

    Args:
        name: a key of `ROWS`.
        out: folder of the benchmark.
        plan: of the benchmark.

    Raises:
        ValueError: no such row.
    """
    check_name("row", name, ROWS)
    steps = plan.steps
    fields: dict[str, Any] = {
        "run.folder": str(out / name),
        "run.steps": steps,
        "run.seed": plan.seed,
        "run.evaluate_every": min(500, steps),
        "run.tracker": "none",
        "schedule.warmup": min(100, steps // 20),
        "schedule.decay": steps // 5,
        "data.arguments.latents": str(out / "latents"),
        "data.arguments.scenes": plan.scenes,
        "data.arguments.tokens": plan.tokens,
    }
    return load_recipe("scenes/ablation", {**fields, **(plan.changes or {}), **ROWS[name]})


def run(
    probe_folder: Path,
    out: Path,
    plan: AblationPlan,
    rows: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train and measure each row; a row that is done is read, one that was interrupted goes on.

    Args:
        probe_folder: of the `SceneProbe`.
        out: gets a run's folder and a row.json per row, the shared latents, and training.json.
        plan: of the benchmark.
        rows: keys of `ROWS`; none: all.
        progress: is told each finished row.

    Returns:
        One dict per row: name, changes, plan, parameters, loss, held_out by noise level, seconds_per_step, scores.

    Raises:
        ValueError: no such row, or one that was trained by another plan.
    """
    for name in rows:
        check_name("row", name, ROWS)
    found = []
    for name in rows or ROWS:
        file = out / name / "row.json"
        settings = parse_object(json.dumps(asdict(plan)), "the plan")
        if file.exists():
            row = read_object(file)
            if row["plan"] != settings:
                raise ValueError(f"{file} is of another plan, {row['plan']}; give another --out or remove its folder")
        else:
            row = {"name": name, "changes": ROWS[name], "plan": settings, **_measured(name, probe_folder, out, plan)}
            write_text(file, json.dumps(row, indent=1, ensure_ascii=False))
        found.append(row)
        write_text(out / "training.json", json.dumps({"rows": found}, indent=1, ensure_ascii=False))
        progress(f"{name}: held-out loss {row['held_out']['held_out']:.4f}")
    return found


def _measured(name: str, probe_folder: Path, out: Path, plan: AblationPlan) -> dict[str, Any]:
    """Train a row, or go on, and measure it."""
    recipe = row_recipe(name, out, plan)
    batches, held_out = training_batches(recipe)
    model = build_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    train(recipe, model=model, batches=batches, held_out=held_out, resume=True)
    file = out / name / "metrics.jsonl"
    lines = [parse_object(line, str(file)) for line in read_lines(file)]
    trained = [line for line in lines if "loss" in line]
    pipe: Any = DiffusionPipeline.from_pretrained(SCENES)
    backbone = load_trained(out / name)
    made = ImgDiTPipeline(build_scheduler(recipe), pipe.vae, pipe.text_encoder, pipe.tokenizer, backbone)
    probe = SceneProbe.from_pretrained(probe_folder).eval()
    maker = PipelineMaker(made, plan.sampler_steps, plan.guidance)
    scores: list[Score] = []
    for measure in (text_scores, condition_scores):
        scores += measure(maker, probe, plan.count, lambda name, images: None)
    half = trained[len(trained) // 2 :]
    return {
        "parameters": parameters,
        "loss": trained[-1].get("velocity", trained[-1]["loss"]),
        "held_out": {key: value for key, value in _last(lines).items() if key.startswith("held_out")},
        "seconds_per_step": math.fsum(line["seconds"] for line in half) / len(half),
        "scores": [asdict(score) for score in scores],
    }


def _last(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last held-out losses."""
    return [line for line in lines if "held_out" in line][-1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text: held-out loss, its difference from the first row, seconds of a step, and `METRICS`."""
    lines = [["row", "held-out loss", "difference", "s/step", *METRICS]]
    first = rows[0]["held_out"]["held_out"]
    for row in rows:
        values = {(score["task"], score["metric"]): score["estimate"][0] for score in row["scores"]}
        loss = row["held_out"]["held_out"]
        lines.append(
            [row["name"], f"{loss:.4f}", f"{loss - first:+.4f}", f"{row['seconds_per_step']:.2f}"]
            + [f"{values[key]:.3f}" for key in METRICS.values()]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
