"""Any-to-any tasks of a model of scenes, each against exact ground truth; `scenes` has those with bars.

Images are (N, 3, S, S) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from imgdit.benchmarks.metrics import abs_rel, mean_iou, psnr
from imgdit.benchmarks.scenes.text_to_image import (
    HeldOut,
    Maker,
    Score,
    expected,
    fraction_score,
    held_out,
    mean_score,
    read,
)
from imgdit.cameras import rotation_error
from imgdit.scenes.geometry import camera_to_world
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.render import render
from imgdit.scenes.tasks import from_scene, scene_classes
from imgdit.scenes.world import Camera, another_camera, another_look

RESTORED = ("blur", "super_resolution", "grey", "mask")
"""Tasks whose condition is a worse copy of the image."""
DRAWN = ("depth", "canny", "segmentation", "boxes")
"""Tasks whose condition is a map of the image."""


class AnyMaker(Maker, Protocol):
    """What is measured."""

    def poses(self, prompts: Sequence[str], first: torch.Tensor, second: torch.Tensor, seed: int) -> torch.Tensor:
        """Camera-to-world matrices (N, 4, 4) of second images, in the frame of the first ones' cameras."""


Keep = Callable[[str, Any], None]


def restoration_scores(maker: AnyMaker, count: int, keep: Keep) -> list[Score]:
    """Blurred, coarse, grey and incomplete images to whole ones: decibels won over what was given."""
    truths, scores = held_out(count), []
    truth = truths.rendering.rgb
    for task in RESTORED:
        inputs = torch.stack([_shown(_condition(task, truths, i), truth.shape[-1]) for i in range(count)])
        generated = maker.conditioned(task, truths.prompts, inputs, seed=0)
        keep(f"{task} → image", (truths.prompts, torch.stack([inputs, generated, truth], 1), []))
        scores.append(
            mean_score(
                f"{task} → image", "PSNR over the given image, dB", psnr(generated, truth) - psnr(inputs, truth)
            )
        )
    return scores


def drawing_scores(maker: AnyMaker, probe: SceneProbe, count: int, keep: Keep) -> list[Score]:
    """Maps to images: is what the probe sees in the image where the map had it?"""
    truths, scores = held_out(count), []
    truth = truths.rendering
    classes = torch.stack([scene_classes(scene, truth.indices[i]) for i, scene in enumerate(truths.scenes)])
    for task in DRAWN:
        inputs = torch.stack([_condition(task, truths, i) for i in range(count)])
        generated = maker.conditioned(task, truths.prompts, inputs, seed=0)
        keep(f"{task} → image", (truths.prompts, torch.stack([inputs, generated], 1), []))
        seen = read(probe, generated)
        scores.append(mean_score(f"{task} → image", "mIoU of what the probe sees", mean_iou(seen.classes, classes)))
        scores.append(mean_score(f"{task} → image", "AbsRel of what the probe sees", abs_rel(seen.depth, truth.depth)))
    boxes = torch.stack([_condition("boxes", truths, i) for i in range(count)])
    generated = maker.condition("boxes", truths.prompts, truth.rgb, seed=0)
    keep("image → boxes", (truths.prompts, torch.stack([truth.rgb, generated], 1), []))
    scores.append(mean_score("image → boxes", "PSNR in dB", psnr(generated, boxes)))
    return scores


def reference_scores(maker: AnyMaker, probe: SceneProbe, count: int, keep: Keep) -> list[Score]:
    """Editing keeps the geometry and changes the look; a subject keeps kind and colour in another place."""
    truths = held_out(count)
    truth = truths.rendering
    looks = [another_look(scene, Random(i)) for i, scene in enumerate(truths.scenes)]
    inputs = render(looks).rgb
    generated = maker.conditioned("editing", truths.prompts, inputs, seed=0)
    keep("editing", (truths.prompts, torch.stack([inputs, generated], 1), []))
    seen = read(probe, generated)
    style = [answer["style"] == scene.style for answer, scene in zip(seen.answers, truths.scenes)]
    scores = [
        fraction_score("editing", "style as asked", style),
        mean_score("editing", "AbsRel of the kept geometry", abs_rel(seen.depth, truth.depth)),
    ]
    single = held_out(count, objects=1)
    inputs = torch.stack([_condition("subject", single, i) for i in range(count)])
    generated = maker.conditioned("subject", single.prompts, inputs, seed=0)
    keep("subject", (single.prompts, torch.stack([inputs, generated], 1), []))
    kept = [
        all(answer[name] == expected(scene)[name] for name in ("left object", "left colour"))
        for answer, scene in zip(read(probe, generated).answers, single.scenes)
    ]
    return [*scores, fraction_score("subject", "kind and colour kept", kept)]


def pose_scores(maker: AnyMaker, count: int) -> list[Score]:
    """The camera of a second image: degrees between the found rotation and the true one."""
    truths = held_out(count)
    others = [another_camera(scene, Random(i)) for i, scene in enumerate(truths.scenes)]
    found = maker.poses(truths.prompts, truths.rendering.rgb, render(others).rgb, seed=0)
    cameras = [(scene.camera, other.camera) for scene, other in zip(truths.scenes, others)]
    truth = torch.stack([relative_pose(*pair) for pair in cameras])
    still = torch.eye(3).expand(count, 3, 3)
    return [
        mean_score("two images → camera", "error of the rotation, degrees", rotation_error(found, truth)),
        mean_score("two images → camera", "error if nothing had turned, degrees", rotation_error(still, truth)),
    ]


def relative_pose(first: Camera, second: Camera) -> torch.Tensor:
    """Camera-to-world matrix (4, 4) of the second camera in the first one's coordinates; OpenCV's axes."""
    matrices = camera_to_world([first, second])
    return torch.linalg.inv(matrices[0]) @ matrices[1]


def _condition(task: str, truths: HeldOut, i: int) -> torch.Tensor:
    return from_scene(task, truths.scenes[i], Random(i), truths.rendering.one(i)).condition


def _shown(image: torch.Tensor, size: int) -> torch.Tensor:
    """The image at full size; super-resolution gives a small one."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
