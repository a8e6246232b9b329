"""How well a model does on scenes: text, depth, edges, segmentation and views against exact ground truth.

Images are (N, 3, S, S) in [0, 1]. What makes them is given as functions (`Maker`), so that the library need not know
pipelines; every draw comes from the held-out splits and fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple, Protocol

import torch

from imgdit.benchmarks.metrics import (
    Interval,
    abs_rel,
    bootstrap,
    delta_1,
    edge_f1,
    fitted,
    frechet,
    mean_iou,
    psnr,
    ssim,
    wilson,
)
from imgdit.scenes.answers import NOTHING
from imgdit.scenes.captions import caption
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.render import Rendering, render
from imgdit.scenes.tasks import depth_to_image, image_to_depth, image_to_segmentation, scene_classes
from imgdit.scenes.world import Scene, another_camera


class Maker(Protocol):
    """What is measured. Every function generates one image per prompt, the same for the same seed."""

    def images(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        """Text to image."""

    def condition(self, task: str, prompts: Sequence[str], images: torch.Tensor, seed: int) -> torch.Tensor:
        """The condition of a task ("depth", "segmentation", "canny") as an image, from images."""

    def conditioned(self, task: str, prompts: Sequence[str], conditions: torch.Tensor, seed: int) -> torch.Tensor:
        """Images from conditions."""

    def views(
        self, prompts: Sequence[str], images: torch.Tensor, cameras: Sequence[tuple[Any, Any]], seed: int
    ) -> torch.Tensor:
        """The scenes of images from other cameras; `cameras` are pairs (of the image, of the wanted view)."""


@dataclass(frozen=True)
class Score:
    """One line of the table."""

    task: str
    """What was asked of the model."""
    metric: str
    """What was measured, with its unit."""
    estimate: Interval
    """The mean over images with its 95 % interval."""
    bar: str
    """What is to be reached, "" where nothing is set."""
    met: bool | None
    """Whether it is; `None` without a bar."""
    counts: dict[str, Any]
    """The raw numbers behind the estimate."""


class HeldOut(NamedTuple):
    """Scenes never trained on, with their prompts and truth."""

    scenes: list[Scene]
    prompts: list[str]
    rendering: Rendering


@lru_cache(maxsize=8)  # every task of a benchmark asks for the same ones
def held_out(count: int, split: str = "heldout", objects: int | None = None, first_seed: int = 100_000) -> HeldOut:
    """Scenes of the held-out splits, from seeds that no held-out loss is measured on."""
    scenes = [Scene.sample(first_seed + i, split, objects) for i in range(count)]
    return HeldOut(scenes, [caption(scene, Random(first_seed + i)) for i, scene in enumerate(scenes)], render(scenes))


class Seen(NamedTuple):
    """What a probe sees in N images."""

    answers: list[dict[str, str]]
    """By question."""
    depth: torch.Tensor
    """(N, 1, S, S)."""
    classes: torch.Tensor
    """(N, S, S) segmentation."""
    features: torch.Tensor
    """(N, D)."""


def read(probe: SceneProbe, images: torch.Tensor, batch: int = 64) -> Seen:
    """Ask a probe about images."""
    answers: list[dict[str, str]] = []
    depths, classes, features = [], [], []
    with torch.no_grad():
        for part in images.split(batch):
            reading = probe(part * 2 - 1)
            chosen = {name: logits.argmax(1).tolist() for name, logits in reading.answers.items()}
            answers += [
                {name: probe.questions[name][numbers[i]] for name, numbers in chosen.items()} for i in range(len(part))
            ]
            depths.append(reading.depth)
            classes.append(reading.segmentation.argmax(1))
            features.append(reading.features)
    return Seen(answers, torch.cat(depths), torch.cat(classes), torch.cat(features))


def expected(scene: Scene) -> dict[str, str]:
    """The right answers to `readings.QUESTIONS`."""
    things = [scene.objects[i] for i in scene.order]
    values = {"style": scene.style, "background": scene.background}
    for side, n in (("left", 0), ("right", 1)):
        values[f"{side} object"] = things[n].kind if n < len(things) else NOTHING
        values[f"{side} colour"] = things[n].colour if n < len(things) else NOTHING
    return values


def fraction_score(task: str, metric: str, right: Sequence[bool], bar: float | None = None) -> Score:
    """A fraction of images, with Wilson's interval."""
    estimate = wilson(sum(right), len(right))
    met = None if bar is None else estimate.value >= bar
    text = "" if bar is None else f"≥ {bar:.0%}"
    return Score(task, metric, estimate, text, met, {"right": sum(right), "of": len(right)})


def mean_score(
    task: str, metric: str, values: torch.Tensor, at_most: float | None = None, at_least: float | None = None
) -> Score:
    """A mean over images, with a bootstrap interval."""
    estimate = bootstrap(values.tolist())
    bar, met = "", None
    if at_most is not None:
        bar, met = f"≤ {at_most:g}", estimate.value <= at_most
    if at_least is not None:
        bar, met = f"≥ {at_least:g}", estimate.value >= at_least
    return Score(task, metric, estimate, bar, met, {"values": [round(v, 5) for v in values.tolist()]})


def text_scores(maker: Maker, probe: SceneProbe, count: int, keep: Callable[[str, Any], None]) -> list[Score]:
    """Text to image: what the probe reads against what was asked."""
    scores = []
    real = read(probe, held_out(count, objects=1).rendering.rgb).features
    for name, split, objects, bar in (
        ("one object", "heldout", 1, 0.95),
        ("held-out triples", "heldout_triples", 1, 0.9),
        ("two objects", "heldout", 2, None),
    ):
        truths = held_out(count, split, objects)
        images = maker.images(truths.prompts, seed=0)
        answers, _, _, features = read(probe, images)
        truth = [expected(scene) for scene in truths.scenes]
        wrong = [i for i, (a, b) in enumerate(zip(answers, truth)) if a != b]
        keep(f"text, {name}", (truths.prompts, images, wrong))

        def right(*questions: str, answers: list = answers, truth: list = truth) -> list[bool]:
            return [all(a[q] == b[q] for q in questions) for a, b in zip(answers, truth)]

        task = f"text → image, {name}"
        if objects == 1:
            # A single object is the probe's left one; a second one where none was asked for is a mistake.
            scores += [
                fraction_score(task, "object right", right("left object", "right object"), bar),
                fraction_score(task, "colour right", right("left colour"), bar),
                fraction_score(task, "style right", right("style"), bar),
            ]
        else:
            both = ("left object", "left colour", "right object", "right colour")
            scores += [
                fraction_score(task, "both objects right, each at its side", right(*both), 0.8),
                fraction_score(task, "both kinds right", right("left object", "right object")),
                fraction_score(task, "style right", right("style")),
            ]
        scores.append(fraction_score(task, "background right", right("background")))
        if name == "one object":
            distance = frechet(features, real)
            scores.append(
                Score(
                    task,
                    "Fréchet distance of probe features",
                    Interval(distance, distance, distance),
                    "",
                    None,
                    {"made": len(features), "real": len(real)},
                )
            )
    return scores


def condition_scores(maker: Maker, probe: SceneProbe, count: int, keep: Callable[[str, Any], None]) -> list[Score]:
    """Image to depth, edges and segmentation, and depth to image."""
    truths = held_out(count)
    truth, rgb = truths.rendering, truths.rendering.rgb
    classes = torch.stack([scene_classes(scene, truth.indices[i]) for i, scene in enumerate(truths.scenes)])
    generated = {
        task: maker.condition(task, truths.prompts, rgb, seed=0) for task in ("depth", "segmentation", "canny")
    }
    for task, images in generated.items():
        keep(f"image → {task}", (truths.prompts, torch.stack([rgb, images], 1), []))
    depth = image_to_depth(generated["depth"])
    scores = [
        mean_score("image → depth", "AbsRel", abs_rel(depth, truth.depth), at_most=0.06),
        mean_score("image → depth", "δ1", delta_1(depth, truth.depth)),
        mean_score(
            "image → segmentation",
            "mIoU",
            mean_iou(image_to_segmentation(generated["segmentation"]), classes),
            at_least=0.85,
        ),
        mean_score(
            "image → edges", "F1 within a pixel", edge_f1(generated["canny"].mean(1, keepdim=True) > 0.5, truth.edges)
        ),
    ]
    inputs = depth_to_image(truth.depth)
    controlled = maker.conditioned("depth", truths.prompts, inputs, seed=0)
    keep("depth → image", (truths.prompts, torch.stack([inputs, controlled], 1), []))
    free = maker.images(truths.prompts, seed=0)
    seen = [read(probe, images).depth for images in (controlled, free)]
    for name, found, bar in (
        ("AbsRel", seen, 0.5),
        ("AbsRel after fitting", [fitted(depth, truth.depth) for depth in seen], None),
    ):
        with_depth, without = (abs_rel(depth, truth.depth) for depth in found)
        scores += [
            mean_score("depth → image", f"{name} of the generated image's depth", with_depth),
            mean_score("the same prompts without depth", f"{name} of the generated image's depth", without),
            mean_score(
                "depth → image", f"{name} relative to that without depth", with_depth / without.mean(), at_most=bar
            ),
        ]
    return scores


def view_scores(maker: Maker, count: int, keep: Callable[[str, Any], None]) -> list[Score]:
    """A new view of a scene from one image and the cameras."""
    truths = held_out(count)
    others = [another_camera(scene, Random(i)) for i, scene in enumerate(truths.scenes)]
    truth, inputs = render(others).rgb, truths.rendering.rgb
    cameras = [(scene.camera, other.camera) for scene, other in zip(truths.scenes, others)]
    generated = maker.views(truths.prompts, inputs, cameras, seed=0)
    keep("view → other view", (truths.prompts, torch.stack([inputs, truth, generated], 1), []))
    gain = psnr(generated, truth) - psnr(inputs, truth)
    return [
        mean_score("view → other view", "PSNR in dB", psnr(generated, truth)),
        mean_score("view → other view", "PSNR over copying the given view, dB", gain, at_least=3.0),
        mean_score("view → other view", "SSIM", ssim(generated, truth)),
    ]


def probe_scores(probe: SceneProbe, count: int) -> list[Score]:
    """The probe itself on renders it never saw."""
    truths = held_out(count)
    answers, depth, _, _ = read(probe, truths.rendering.rgb)
    truth = [expected(scene) for scene in truths.scenes]
    scores = [
        fraction_score("probe on renders", f"{name} right", [a[name] == b[name] for a, b in zip(answers, truth)], 0.99)
        for name in probe.questions
    ]
    real = truths.rendering.depth
    return [
        *scores,
        mean_score("probe on renders", "AbsRel of depth", abs_rel(depth, real)),
        mean_score("probe on renders", "AbsRel after fitting of depth", abs_rel(fitted(depth, real), real)),
    ]
