"""`imgdit bench scenes`, `people`, `any`, `control` and `text`: the tables, the raw numbers and the sheets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from imgdit import DiffusionPipeline
from imgdit.benchmarks.scenes.any_to_any import (
    drawing_scores,
    pose_scores,
    reference_scores,
    restoration_scores,
)
from imgdit.benchmarks.scenes.control import control_scores, subject_scores
from imgdit.benchmarks.scenes.image_text import (
    answer_scores,
    cache_scores,
    caption_scores,
    fill_scores,
    round_trip_scores,
    schedule_scores,
)
from imgdit.benchmarks.scenes.image_text_writer import PipelineWriter
from imgdit.benchmarks.scenes.judge import judge_scores
from imgdit.benchmarks.scenes.maker import PipelineMaker
from imgdit.benchmarks.scenes.people import people_prompts, people_scores
from imgdit.benchmarks.scenes.text_to_image import (
    Score,
    condition_scores,
    probe_scores,
    text_scores,
    view_scores,
)
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.images import to_image
from imgdit.images.sheet import contact_sheet
from imgdit.naming import check_name
from imgdit.pipelines.image_text_loading import load_image_text_pipeline
from imgdit.pipelines.load_options import LoadOptions
from imgdit.scenes.probe import SceneProbe

logger = logging.getLogger(__name__)
SHEET = 64
"""Images on a sheet."""


def run(model: Path, probe_folder: Path, out: Path, count: int, steps: int, guidance: float) -> list[Score]:
    """Measure a model of the scenes; `out` gets scenes.json and the sheets.

    Args:
        model, probe_folder: of the pipeline and of the `SceneProbe`.
        out: folder.
        count: images of each kind.
        steps, guidance: of the sampler.
    """
    maker, probe = _load(model, probe_folder, steps, guidance)
    kept: dict[str, Any] = {}
    scores = probe_scores(probe, 5 * count)
    scores += text_scores(maker, probe, count, kept.__setitem__)
    scores += condition_scores(maker, probe, count, kept.__setitem__)
    scores += view_scores(maker, count, kept.__setitem__)
    settings = {"model": _name(model), "steps": steps, "guidance": guidance}
    write(out / "scenes.json", scores, {**settings, "seconds": seconds(maker, model)})
    sheets(kept, out)
    return scores


def run_people(
    model: Path, probe_folder: Path, out: Path, count: int | None, steps: int, guidance: float
) -> list[Score]:
    """Measure prompts as people write them; `out` gets people.json and the sheets.

    Args:
        model, probe_folder, out, steps, guidance: as of `run`.
        count: prompts; all by default.
    """
    maker, probe = _load(model, probe_folder, steps, guidance)
    kept: dict[str, Any] = {}
    asked = people_prompts(count)
    scores = people_scores(maker, probe, asked, kept.__setitem__)
    settings = {"model": _name(model), "steps": steps, "guidance": guidance, "prompts": len(asked)}
    write(out / "people.json", scores, settings)
    sheets(kept, out)
    return scores


def run_any(model: Path, probe_folder: Path, out: Path, count: int, steps: int, guidance: float) -> list[Score]:
    """Measure the any-to-any tasks; `out` gets any.json and the sheets. Arguments as of `run`."""
    maker, probe = _load(model, probe_folder, steps, guidance)
    kept: dict[str, Any] = {}
    scores = restoration_scores(maker, count, kept.__setitem__)
    scores += drawing_scores(maker, probe, count, kept.__setitem__)
    scores += reference_scores(maker, probe, count, kept.__setitem__)
    scores += condition_scores(maker, probe, count, kept.__setitem__)
    scores += view_scores(maker, count, kept.__setitem__)
    scores += pose_scores(maker, count)
    write(out / "any.json", scores, {"model": _name(model), "steps": steps, "guidance": guidance})
    sheets(kept, out)
    return scores


def run_control(
    model: Path, adapters: Path, probe_folder: Path, out: Path, count: int, steps: int, guidance: float,
    judge: str | Path | None = None,
) -> list[Score]:  # fmt: skip
    """Measure the condition adapters of a folder; `out` gets control.json and the sheets.

    Args:
        adapters: folder.
        judge: pipeline that is asked about the images besides the probe, see `load_image_text_pipeline`.
        model, probe_folder, out, count, steps, guidance: as of `run`.

    Raises:
        ValueError: an adapter that is measured is not there.
    """
    maker, probe = _load(model, probe_folder, steps, guidance)
    names = maker.load_controls(adapters)
    missing = [name for name in ("depth", "canny", "inpainting", "subject") if name not in names]
    if missing:
        raise ValueError(f"{adapters} holds {', '.join(names)}; the benchmark needs {', '.join(missing)} as well")
    asked = None
    if judge is not None:
        asked = PipelineWriter(load_image_text_pipeline(judge, LoadOptions(device="auto")))
    kept: dict[str, Any] = {}
    scores = control_scores(maker, probe, count, kept.__setitem__, asked)
    scores += subject_scores(maker, probe, count, kept.__setitem__)
    settings: dict[str, Any] = {"model": _name(model), "steps": steps, "guidance": guidance}
    write(out / "control.json", scores, settings | ({} if judge is None else {"judge": str(judge)}))
    sheets(kept, out)
    return scores


def run_text(
    model: Path, probe_folder: Path, out: Path, count: int, text_steps: int | None, steps: int, guidance: float,
    only: Collection[str] = (),
) -> list[Score]:  # fmt: skip
    """Measure what a model writes about scenes; `out` gets text.json and the sheets.

    Args:
        model, probe_folder: of a pipeline that writes about images, and of the `SceneProbe`.
        out: folder.
        count: images or questions of each kind.
        text_steps: of texts; `None`: the pipeline's own number.
        steps, guidance: of images.
        only: names of `PARTS`; all if empty.

    Raises:
        ValueError: an unknown part, or one that this pipeline cannot do.
    """
    for name in only:
        check_name("part of the benchmark", name, PARTS)
    options = LoadOptions(device="auto")
    writer = PipelineWriter(load_image_text_pipeline(model, options), text_steps, steps, guidance)
    lacking = [name for name in only if name not in writer.can]
    if lacking:
        raise ValueError(f"{_name(model)} can be measured in {', '.join(writer.can)}; got {', '.join(lacking)}")
    kept: dict[str, Any] = {}
    scores: list[Score] = []
    for name in PARTS:
        if name not in (only or writer.can) or name not in writer.can:
            continue
        if name == "round trips":
            probe = SceneProbe.from_pretrained(probe_folder).eval()
            scores += round_trip_scores(writer, writer, probe, count, kept.__setitem__)
        elif name == "judge":
            probe = SceneProbe.from_pretrained(probe_folder).eval()
            scores += judge_scores(writer, probe, count, kept.__setitem__)
        elif name == "schedules":
            scores += schedule_scores(writer, count)
        elif name == "cache":
            scores += cache_scores(writer, count)
        else:
            scores += PARTS[name](writer, count, kept.__setitem__)
        settings: dict[str, Any] = {"model": _name(model), "text steps": text_steps, "steps": steps}
        write(out / "text.json", scores, {**settings, "guidance": guidance})
    sheets(kept, out)
    return scores


PARTS: dict[str, Any] = {
    "captions": caption_scores,
    "answers": answer_scores,
    "fillings": fill_scores,
    "round trips": round_trip_scores,
    "judge": judge_scores,
    "schedules": schedule_scores,
    "cache": cache_scores,
}
"""What `run_text` measures."""


def _name(model: Path) -> str:
    """What the numbers call a model: where it lies on this machine is nobody's business."""
    return EMBEDDED if model == SCENES else model.name


def _load(model: Path, probe: Path, steps: int, guidance: float) -> tuple[PipelineMaker, SceneProbe]:
    pipe = DiffusionPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    return PipelineMaker(pipe, steps, guidance), SceneProbe.from_pretrained(probe).eval()


def write(path: Path, scores: list[Score], settings: dict[str, Any]) -> None:
    """The scores with every raw count, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {**settings, "scores": [asdict(score) for score in scores]}
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False), encoding="utf-8")


def seconds(maker: PipelineMaker, model: Path, rounds: int = 3) -> dict[str, list[float]]:
    """Wall-clock seconds of one image in this process, of loading the pipeline, and of `imgdit generate`."""
    found: dict[str, list[float]] = {"one image": [], "loading": [], "whole process": []}
    for _ in range(rounds):
        start = time.perf_counter()
        maker.text("a red cube", num_inference_steps=maker.steps, guidance_scale=maker.guidance)
        found["one image"].append(time.perf_counter() - start)
        start = time.perf_counter()
        DiffusionPipeline.from_pretrained(model)
        found["loading"].append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "imgdit.apps.cli", "generate", "a red cube", "--out", f"{folder}/x.png"]
            start = time.perf_counter()
            subprocess.run([*command, "--model", str(model)], check=True, capture_output=True)
            found["whole process"].append(time.perf_counter() - start)
    return found


def sheets(kept: dict[str, Any], out: Path) -> list[Path]:
    """A sheet of each task's first images, and one of what the probe calls mistakes."""
    files, failures = [], []
    for name, (prompts, images, wrong) in kept.items():
        groups = images if images.ndim == 5 else images[:, None]  # (N, K, 3, S, S)
        tiles = [([to_image(p) for p in group], prompt) for prompt, group in zip(prompts, groups)]
        failures += [tiles[i] for i in wrong]
        files.append(out / f"{name.replace(' → ', '-to-').replace(', ', '-').replace(' ', '-')}.png")
        contact_sheet(tiles[:SHEET], columns=8 // len(groups[0]) or 1, title=name.replace("→", "to")).save(files[-1])
    if failures:
        files.append(out / "failures.png")
        contact_sheet(failures[:SHEET], columns=8, title=f"{len(failures)} mistakes by the probe").save(files[-1])
    return files


def table(scores: list[Score]) -> str:
    """The scores as aligned text."""
    rows = [("task", "metric", "value", "95 % interval", "bar", "")]
    for score in scores:
        value, low, high = score.estimate
        reached = {None: "", True: "met", False: "missed"}[score.met]
        rows.append((score.task, score.metric, f"{value:.3f}", f"{low:.3f} – {high:.3f}", score.bar, reached))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
