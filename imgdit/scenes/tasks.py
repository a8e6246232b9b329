"""Tasks: what is given beside the caption, and what is to be generated.

A task turns a scene, whose truth the renderer knows, or a photo, whose truth a library estimates, into a condition
image and the image that belongs to it. Some tasks have an inverse, which gives the image and asks for the
condition: depth from an image, for one.

Images are (3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image

from imgdit.images.convert import to_image, to_pixels
from imgdit.images.preprocess import (
    areas_of_colours,
    blurred,
    greyed,
    opened,
    photo_blur,
    photo_canny,
    photo_depth,
    photo_grey,
    photo_mask,
    photo_super_resolution,
    smaller,
    with_hole,
)
from imgdit.naming import check_name
from imgdit.scenes.render import FAR, Rendering, Size, render
from imgdit.scenes.world import OBJECTS, Scene, another_camera, between, draw, is_trained, pick

NEAR = 1.5
"""z-depth that a depth image shows white; `FAR` is black."""
PALETTE = (
    (0.0, 0.0, 0.0),
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
    (1.0, 0.0, 1.0),
    (0.0, 1.0, 1.0),
    (1.0, 1.0, 1.0),
    (0.5, 0.5, 0.5),
)
"""Colours of a segmentation: ground and beyond, then the kinds of `scenes.OBJECTS` in their order."""


class Example(NamedTuple):
    """One pair of images for training or evaluation."""

    condition: torch.Tensor
    """(3, H, W) in [0, 1]: what is given. Super-resolution gives the small image."""
    target: torch.Tensor
    """(3, H, W) in [0, 1]: what is to be generated."""
    details: dict[str, Any]
    """What the task knows besides, under the names that `SCENE_TASKS` lists."""


@dataclass(frozen=True)
class SceneTask:
    """A task by its name."""

    name: str
    """Key in `SCENE_TASKS`."""
    scene: Callable[[_Source], tuple[torch.Tensor, dict[str, Any]]]
    """Condition image and details of a rendered scene."""
    photo: Callable[..., tuple[torch.Tensor, dict[str, Any]]] | None = None
    """The same of a photo; `None`: no library can tell."""
    invertible: bool = False
    """Whether the condition can be asked for, given the image."""


class _Source(NamedTuple):
    """What a task may look at."""

    scene: Scene
    rendering: Rendering
    """Of this scene alone."""
    rng: Random

    @property
    def rgb(self) -> torch.Tensor:
        return self.rendering.rgb[0]

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rendering.rgb.shape[-2], self.rendering.rgb.shape[-1]

    @property
    def size(self) -> int:
        """Of the shorter side, in pixels."""
        return min(self.sides)

    def render(self, scene: Scene) -> Rendering:
        return render([scene], self.sides, self.rendering.rgb.device)


def from_scene(
    task: str,
    scene: Scene,
    rng: Random,
    rendering: Rendering | None = None,
    size: Size = 128,
    inverse: bool = False,
) -> Example:
    """Condition and target of a scene, both exact.

    Args:
        task: a key of `SCENE_TASKS`.
        scene: what is shown.
        rng: draws holes, reference scenes and the other camera.
        rendering: of this scene alone; rendered here if `None`.
        size: pixels per side, if rendered here.
        inverse: give the image and ask for the condition.
    """
    chosen = _task(task, inverse)
    rendering = render([scene], size) if rendering is None else rendering
    if rendering.rgb.shape[0] != 1:
        raise ValueError(f"got the rendering of {rendering.rgb.shape[0]} scenes; take one with `rendering.one(row)`")
    condition, details = chosen.scene(_Source(scene, rendering, rng))
    return _example(condition, rendering.rgb[0], details, inverse)


def from_photo(task: str, photo: Image.Image | str | Path, inverse: bool = False, **options: Any) -> Example:
    """Condition and target of a photo, by the libraries that people use for it.

    Args:
        task: a key of `SCENE_TASKS` whose entry has a `photo` function; its options are that function's.
        photo: an image or its file.
        inverse: give the photo and ask for the condition.
    """
    chosen = _task(task, inverse)
    if chosen.photo is None:
        able = ", ".join(name for name, other in SCENE_TASKS.items() if other.photo)
        raise ValueError(f"the task {task!r} needs a scene, a photo does not tell its truth. Photos can: {able}")
    image = opened(photo)
    condition, details = chosen.photo(image, **options)
    return _example(condition, to_pixels(image)[0], details, inverse)


def _task(name: str, inverse: bool) -> SceneTask:
    check_name("task", name, SCENE_TASKS)
    if inverse and not SCENE_TASKS[name].invertible:
        able = ", ".join(task.name for task in SCENE_TASKS.values() if task.invertible)
        raise ValueError(f"the task {name!r} has no inverse. These have one: {able}")
    return SCENE_TASKS[name]


def _example(condition: torch.Tensor, image: torch.Tensor, details: dict[str, Any], inverse: bool) -> Example:
    return Example(image, condition, details) if inverse else Example(condition, image, details)


# Depth


def depth_to_image(depth: torch.Tensor) -> torch.Tensor:
    """z-depth (…, 1, H, W) in world units to an image (…, 3, H, W): white at `NEAR`, black at `FAR`, linear between.

    Linear and not inverse, because an image's error then costs the same length everywhere, 0.03 units for a step of 8
    bits. What is nearer than `NEAR` or beyond `FAR` is cut off.
    """
    value = (FAR - depth.clamp(NEAR, FAR)) / (FAR - NEAR)
    return value.expand(*depth.shape[:-3], 3, *depth.shape[-2:])


def image_to_depth(image: torch.Tensor) -> torch.Tensor:
    """The inverse of `depth_to_image`; of a coloured image the mean of the channels counts."""
    return FAR - image.mean(-3, keepdim=True).clamp(0, 1) * (FAR - NEAR)


def _scene_depth(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    depth = source.rendering.depth[0]
    return depth_to_image(depth), {"depth": depth}


# Edges


def _scene_canny(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    return source.rendering.edges[0].float().expand(3, -1, -1), {}


# Segmentation and boxes


def segmentation_to_image(classes: torch.Tensor) -> torch.Tensor:
    """Classes (…, H, W), 0 ground and beyond, k the kind `OBJECTS[k - 1]`, to colours (…, 3, H, W) of `PALETTE`."""
    return torch.tensor(PALETTE, device=classes.device)[classes.long()].movedim(-1, -3)


def image_to_segmentation(image: torch.Tensor) -> torch.Tensor:
    """Colours (…, 3, H, W) to classes (…, H, W), see `areas_of_colours` and `PALETTE`."""
    return areas_of_colours(image, torch.tensor(PALETTE, device=image.device))


def _classes(scene: Scene) -> list[int]:
    return [0, *(OBJECTS.index(thing.kind) + 1 for thing in scene.objects)]


def scene_classes(scene: Scene, indices: torch.Tensor) -> torch.Tensor:
    """Classes of a scene's index map: 0 ground and beyond, k the kind `OBJECTS[k - 1]`."""
    return torch.tensor(_classes(scene), device=indices.device)[indices]


def _scene_segmentation(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    classes = scene_classes(source.scene, source.rendering.indices[0])
    return segmentation_to_image(classes), {"classes": classes}


def _scene_boxes(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    """A frame around each object and a faint fill, in its kind's colour of `PALETTE`."""
    boxes = source.rendering.boxes[0]
    image = boxes.new_zeros(3, *source.sides)
    width = max(1, round(source.size / 64))
    for box, kind in zip(boxes.long().tolist(), _classes(source.scene)[1:]):
        left, top, right, bottom = box
        colour = image.new_tensor(PALETTE[kind])[:, None, None]
        inside = image[:, top:bottom, left:right]
        middle = inside[:, width:-width, width:-width].clone()
        inside[:] = colour
        inside[:, width:-width, width:-width] = torch.maximum(middle, 0.25 * colour)
    return image, {"boxes": boxes, "kinds": [thing.kind for thing in source.scene.objects]}


def _scene_blur(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    radius = between(source.rng, 2.0, 5.0) * source.size / 128
    return blurred(source.rgb, radius), {"radius": radius}


def _scene_grey(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    return greyed(source.rgb), {}


def _scene_mask(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hides one object with some room around it, or a rectangle anywhere."""
    rows, columns = source.sides
    mask = torch.zeros(1, rows, columns, dtype=torch.bool, device=source.rgb.device)
    left, top, right, bottom = pick(source.rng, source.rendering.boxes[0, : len(source.scene.objects)].long().tolist())
    if source.rng.random() < 0.5:
        room = round(between(source.rng, 0.0, 0.08) * source.size)
        mask[:, max(0, top - room) : bottom + room, max(0, left - room) : right + room] = True
    else:
        height, width = (round(between(source.rng, 0.25, 0.6) * side) for side in source.sides)
        row, column = (int(source.rng.random() * (side - n)) for side, n in zip(source.sides, (height, width)))
        mask[:, row : row + height, column : column + width] = True
    return with_hole(source.rgb, mask)


def _scene_super_resolution(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    small, details = smaller(to_image(source.rgb), pick(source.rng, (2, 4)))
    return small.to(source.rgb.device), details


# References: another image


def _scene_subject(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    """The first object alone elsewhere: its kind and colour stay, camera, background and style are other ones."""
    thing = source.scene.objects[0]
    # No reference shows a held-out triple, whatever the split of the scene: it may be trained on. Neon and sepia would
    # not show the colour well.
    styles = [s for s in ("photo", "cartoon", "sketch", "mosaic") if is_trained(thing.kind, thing.colour, s)]
    reference = draw(
        source.rng,
        allowed=lambda kind, colour, _: (kind, colour) == (thing.kind, thing.colour),
        objects=1,
        style=pick(source.rng, styles),
    )
    return source.render(reference).rgb[0], {"reference": reference}


def _scene_style_reference(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    """Another scene in the same style, with none of the kinds and colours."""
    kinds = {thing.kind for thing in source.scene.objects}
    colours = {thing.colour for thing in source.scene.objects}
    reference = draw(
        source.rng,
        allowed=lambda kind, colour, style: (
            is_trained(kind, colour, style) and kind not in kinds and colour not in colours
        ),
        style=source.scene.style,
    )
    return source.render(reference).rgb[0], {"reference": reference}


def _scene_views(source: _Source) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same scene from another place on the camera's sphere, 10 to 40 degrees around."""
    other = another_camera(source.scene, source.rng)
    seen = source.render(other)
    return seen.rgb[0], {
        "cameras": (other.camera, source.scene.camera),
        "poses": torch.cat([seen.pose, source.rendering.pose]),
        "intrinsics": source.rendering.intrinsics,
    }


SCENE_TASKS = {
    task.name: task
    for task in (
        SceneTask("canny", _scene_canny, photo_canny, invertible=True),
        SceneTask("depth", _scene_depth, photo_depth, invertible=True),
        SceneTask("segmentation", _scene_segmentation, invertible=True),
        SceneTask("boxes", _scene_boxes, invertible=True),
        SceneTask("blur", _scene_blur, photo_blur),
        SceneTask("grey", _scene_grey, photo_grey),
        SceneTask("mask", _scene_mask, photo_mask),
        SceneTask("super_resolution", _scene_super_resolution, photo_super_resolution),
        SceneTask("subject", _scene_subject),
        SceneTask("style_reference", _scene_style_reference),
        SceneTask("views", _scene_views, invertible=True),
    )
}
"""The tasks by name. Details: `depth` depth (1, H, W), of photos estimate; `canny` low, high of photos; `segmentation`
classes (H, W); `boxes` boxes (2, 4) in pixels and kinds; `blur` radius in pixels; `mask` mask (1, H, W), true where
hidden; `super_resolution` factor; `subject` and `style_reference` reference, the scene shown; `views` cameras, poses
(2, 4, 4) and intrinsics, the condition's first."""
