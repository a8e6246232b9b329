"""What condition adapters do to a model of scenes: is the condition obeyed, and the prompt still?

Images are (N, 3, S, S) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Protocol

import torch

from imgdit.benchmarks.alignment import alignment
from imgdit.benchmarks.metrics import abs_rel, edge_f1, fitted
from imgdit.benchmarks.scenes.judge import Judge, finds
from imgdit.benchmarks.scenes.text_to_image import (
    HeldOut,
    Score,
    Seen,
    expected,
    fraction_score,
    held_out,
    mean_score,
    read,
)
from imgdit.scenes.captions import caption
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.tasks import Example, from_scene, scene_classes
from imgdit.scenes.world import Scene

TEXT = ("left object", "left colour", "right object", "right colour", "style")
"""What of a prompt must be right."""


class ControlMaker(Protocol):
    """What is measured."""

    def controlled(self, prompts: Sequence[str], conditions: Mapping[str, torch.Tensor], seed: int) -> torch.Tensor:
        """An image per prompt, under conditions (N, 3, S, S) by the adapters that read them; with none of them, plain
        images from the same noise."""


Keep = Callable[[str, Any], None]


METRICS: dict[str, tuple[str, dict[str, float]]] = {
    "AbsRel": ("AbsRel of depth", {"at_most": 0.5}),
    "fitted": ("AbsRel of depth after fitting", {}),
    "F1": ("F1 of outlines", {"at_least": 2.0}),
    "AbsRel around": ("AbsRel of depth around the hole", {}),
    "F1 around": ("F1 of outlines around the hole", {}),
}
"""How near images are to the truth: what it is called, and the bar of its ratio to that without a condition."""
WANTED = {"depth": ("AbsRel", "fitted"), "canny": ("F1",), "inpainting": tuple(METRICS)}
"""What each condition has to improve."""


def outlines(classes: torch.Tensor) -> torch.Tensor:
    """Where a segmentation (N, H, W) changes to the right or below, boolean (N, 1, H, W)."""
    right, below = torch.zeros_like(classes, dtype=torch.bool), torch.zeros_like(classes, dtype=torch.bool)
    right[..., :-1] = classes[..., :-1] != classes[..., 1:]
    below[..., :-1, :] = classes[..., :-1, :] != classes[..., 1:, :]
    return (right | below)[:, None]


def control_scores(
    maker: ControlMaker, probe: SceneProbe, count: int, keep: Keep, judge: Judge | None = None
) -> list[Score]:
    """Depth, edges and a hole to fill, alone and two at once, against the same prompts and noise without them.

    Args:
        judge: is asked for the prompts' objects, colours and styles besides the probe.
    """
    truths = held_out(count)
    truth = truths.rendering
    classes = torch.stack([scene_classes(scene, truth.indices[i]) for i, scene in enumerate(truths.scenes)])
    holes = _examples("mask", truths)
    inputs = {
        "depth": _conditions("depth", truths),
        "canny": _conditions("canny", truths),
        "inpainting": _stacked(holes),
    }
    shown = torch.stack([~hole.details["mask"] for hole in holes])
    free = maker.controlled(truths.prompts, {}, seed=0)
    plain = read(probe, free)
    base = _obeyed(plain, truth.depth, classes, shown)
    right = _text_right(plain, truths.scenes)
    scores = [mean_score("no condition", METRICS[name][0], base[name]) for name in ("AbsRel", "fitted", "F1")]
    scores.append(fraction_score("no condition", "text right", right))
    scores += _judged("no condition", judge, free, truths.scenes, right)
    for names in (("depth",), ("canny",), ("inpainting",), ("depth", "canny")):
        conditions = {name: inputs[name] for name in names}
        generated = maker.controlled(truths.prompts, conditions, seed=0)
        task = " + ".join(names)
        keep(task, (truths.prompts, torch.stack([*conditions.values(), generated], 1), []))
        seen = read(probe, generated)
        got = _obeyed(seen, truth.depth, classes, shown)
        for metric in dict.fromkeys(metric for name in names for metric in WANTED[name]):
            title, bar = METRICS[metric]
            ratio = got[metric] / base[metric].mean()
            scores.append(mean_score(task, f"{title} over that without", ratio, **bar))
        now = _text_right(seen, truths.scenes)
        change = torch.tensor([float(a) - float(b) for a, b in zip(now, right)])
        found = alignment(list(conditions[names[0]]), list(generated))
        scores.append(mean_score(task, f"shift against {names[0]}, pixels", found.shifts.norm(dim=1)))
        scores.append(mean_score(task, f"distance of edges to those of {names[0]}, pixels", found.distances))
        scores.append(fraction_score(task, "text right", now))
        scores += _judged(task, judge, generated, truths.scenes, now)
        scores.append(mean_score(task, "change of text right", change, at_least=-0.02))
    return scores


def _judged(
    task: str, judge: Judge | None, images: torch.Tensor, scenes: Sequence[Scene], right: Sequence[bool]
) -> list[Score]:
    """What a judge says of the same, and whether probe and judge agree on it."""
    if judge is None:
        return []
    found = finds(judge, images, scenes)
    agree = [one == other for one, other in zip(found, right, strict=True)]
    return [
        fraction_score(task, "text right, by the judge", found),
        fraction_score(task, "judge agrees with the probe on text", agree),
    ]


def subject_scores(maker: ControlMaker, probe: SceneProbe, count: int, keep: Keep) -> list[Score]:
    """A subject in a new place and style, which the prompt does not name."""
    truths = held_out(count, objects=1)
    prompts = [caption(scene, Random(i), ["subject"]) for i, scene in enumerate(truths.scenes)]
    inputs = _conditions("subject", truths)
    generated = maker.controlled(prompts, {"subject": inputs}, seed=0)
    keep("subject", (prompts, torch.stack([inputs, generated], 1), []))
    seen = read(probe, generated)
    kept = [
        all(answer[name] == expected(scene)[name] for name in ("left object", "left colour"))
        for answer, scene in zip(seen.answers, truths.scenes)
    ]
    style = [answer["style"] == scene.style for answer, scene in zip(seen.answers, truths.scenes)]
    return [
        fraction_score("subject", "kind and colour kept, unnamed", kept, 0.9),
        fraction_score("subject", "style as asked", style),
    ]


def _conditions(task: str, truths: HeldOut) -> torch.Tensor:
    return _stacked(_examples(task, truths))


def _examples(task: str, truths: HeldOut) -> list[Example]:
    return [from_scene(task, scene, Random(i), truths.rendering.one(i)) for i, scene in enumerate(truths.scenes)]


def _stacked(examples: Sequence[Example]) -> torch.Tensor:
    return torch.stack([example.condition for example in examples])


def _obeyed(seen: Seen, depth: torch.Tensor, classes: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """How near images are to the truth; "around" counts only what a mask (N, 1, H, W) shows."""
    generated, real = outlines(seen.classes), outlines(classes)
    return {
        "AbsRel": abs_rel(seen.depth, depth),
        "fitted": abs_rel(fitted(seen.depth, depth), depth),
        "F1": edge_f1(generated, real),
        "AbsRel around": abs_rel(seen.depth, depth, shown),
        "F1 around": edge_f1(generated & shown, real & shown),
    }


def _text_right(seen: Seen, scenes: Sequence[Scene]) -> list[bool]:
    truth = [expected(scene) for scene in scenes]
    return [all(answer[name] == real[name] for name in TEXT) for answer, real in zip(seen.answers, truth)]
