"""Tasks: what is given beside the sentence, and what is to be made.

A task turns a scene, whose truth the renderer knows, or a photo, whose truth a library estimates, into a condition
picture and the picture that belongs to it. Some tasks have an inverse, which gives the picture and asks for the
condition: depth from a picture, for one.

Pictures are (3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from imgdit.images.convert import to_image, to_pixels, to_rgb
from imgdit.images.masks import mask_values
from imgdit.images.opening import open_image

from ..naming import check_name
from .render import FAR, Rendering, render
from .scenes import OBJECTS, Scene, another_camera, between, draw, is_trained, pick

NEAR = 1.5
"""z-depth that a depth picture shows white; `FAR` is black."""
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
HOLE = 0.5
"""Grey of what an inpainting condition hides."""


class Example(NamedTuple):
    """One pair of pictures for training or evaluation."""

    condition: torch.Tensor
    """(3, H, W) in [0, 1]: what is given. Super-resolution gives the small picture."""
    target: torch.Tensor
    """(3, H, W) in [0, 1]: what is to be made."""
    details: dict[str, Any]
    """What the task knows besides, under the names that `TASKS` lists."""


@dataclass(frozen=True)
class Task:
    """A task by its name."""

    name: str
    """Key in `TASKS`."""
    help: str
    """What is given and what is made, in a line."""
    scene: Callable[[_Given], tuple[torch.Tensor, dict[str, Any]]]
    """Condition picture and details of a rendered scene."""
    photo: Callable[..., tuple[torch.Tensor, dict[str, Any]]] | None = None
    """The same of a photo; `None`: no library can tell."""
    invertible: bool = False
    """Whether the condition can be asked for, given the picture."""


class _Given(NamedTuple):
    """What a task may look at."""

    scene: Scene
    rendering: Rendering
    """Of this scene alone."""
    rng: Random

    @property
    def rgb(self) -> torch.Tensor:
        return self.rendering.rgb[0]

    @property
    def size(self) -> int:
        return self.rendering.rgb.shape[-1]

    def render(self, scene: Scene) -> Rendering:
        return render([scene], self.size, self.rendering.rgb.device)


def from_scene(
    task: str,
    scene: Scene,
    rng: Random,
    rendering: Rendering | None = None,
    size: int = 128,
    inverse: bool = False,
) -> Example:
    """Condition and target of a scene, both exact.

    Args:
        task: a key of `TASKS`.
        scene: what is shown.
        rng: draws holes, reference scenes and the other camera.
        rendering: of this scene alone; rendered here if `None`.
        size: pixels per side, if rendered here.
        inverse: give the picture and ask for the condition.
    """
    chosen = _task(task, inverse)
    rendering = render([scene], size) if rendering is None else rendering
    if rendering.rgb.shape[0] != 1:
        raise ValueError(f"got the rendering of {rendering.rgb.shape[0]} scenes; take one with `rendering.one(row)`")
    condition, details = chosen.scene(_Given(scene, rendering, rng))
    return _example(condition, rendering.rgb[0], details, inverse)


def from_photo(task: str, photo: Image.Image | str | Path, inverse: bool = False, **options: Any) -> Example:
    """Condition and target of a photo, by the libraries that people use for it.

    Args:
        task: a key of `TASKS` whose entry has a `photo` function; its options are that function's.
        photo: a picture or its file.
        inverse: give the photo and ask for the condition.
    """
    chosen = _task(task, inverse)
    if chosen.photo is None:
        able = ", ".join(name for name, other in TASKS.items() if other.photo)
        raise ValueError(f"the task {task!r} needs a scene, a photo does not tell its truth. Photos can: {able}")
    picture = _opened(photo)
    condition, details = chosen.photo(picture, **options)
    return _example(condition, to_pixels(picture)[0], details, inverse)


def check_photo_task(task: str, options: Mapping[str, Any]) -> None:
    """Refuse at once what `from_photo` would refuse at its first photo.

    Raises:
        ImportError: a package is not installed.
        ValueError: no such task of photos, or an option is missing.
    """
    check_name("task of photos", task, [name for name, other in TASKS.items() if other.photo])
    if task == "canny":
        _opencv()
    elif task == "depth":
        _check_depth_model(options.get("model"))


def _task(name: str, inverse: bool) -> Task:
    check_name("task", name, TASKS)
    if inverse and not TASKS[name].invertible:
        able = ", ".join(task.name for task in TASKS.values() if task.invertible)
        raise ValueError(f"the task {name!r} has no inverse. These have one: {able}")
    return TASKS[name]


def _example(condition: torch.Tensor, picture: torch.Tensor, details: dict[str, Any], inverse: bool) -> Example:
    return Example(picture, condition, details) if inverse else Example(condition, picture, details)


def _opened(photo: Image.Image | str | Path) -> Image.Image:
    return to_rgb(photo if isinstance(photo, Image.Image) else open_image(photo))


# Depth


def depth_to_picture(depth: torch.Tensor) -> torch.Tensor:
    """z-depth (…, 1, H, W) in world units to a picture (…, 3, H, W): white at `NEAR`, black at `FAR`, linear between.

    Linear and not inverse, because a picture's error then costs the same length everywhere, 0.03 units for a step of 8
    bits. What is nearer than `NEAR` or beyond `FAR` is cut off.
    """
    value = (FAR - depth.clamp(NEAR, FAR)) / (FAR - NEAR)
    return value.expand(*depth.shape[:-3], 3, *depth.shape[-2:])


def picture_to_depth(picture: torch.Tensor) -> torch.Tensor:
    """The inverse of `depth_to_picture`; of a coloured picture the mean of the channels counts."""
    return FAR - picture.mean(-3, keepdim=True).clamp(0, 1) * (FAR - NEAR)


def _scene_depth(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    depth = given.rendering.depth[0]
    return depth_to_picture(depth), {"depth": depth}


@lru_cache(maxsize=2)
def _depth_model(name: str) -> Any:
    from transformers import pipeline

    return pipeline("depth-estimation", model=name)


def _photo_depth(
    photo: Image.Image, model: str | None = None, near_is_large: bool = True
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Depth by a `depth-estimation` model of transformers: near is white, the nearest 1 and the farthest 0. The scale
    of a photo is unknown, so this is no picture for `picture_to_depth`.

    Args:
        photo: the picture.
        model: folder or Hub repository of the model, such as "depth-anything/Depth-Anything-V2-Small-hf".
        near_is_large: whether the model says inverse depth, as DPT and Depth Anything do; `False` for models that say
            metres, such as ZoeDepth, GLPN and DepthPro.
    """
    _check_depth_model(model)
    estimate = _depth_model(model)(photo)["predicted_depth"].float()
    estimate = F.interpolate(estimate.view(1, 1, *estimate.shape[-2:]), photo.size[::-1], mode="bilinear")[0]
    low, high = estimate.amin(), estimate.amax()
    value = (estimate - low) / (high - low).clamp(min=1e-6)
    value = value if near_is_large else 1 - value
    return value.expand(3, -1, -1), {"estimate": estimate}


def _check_depth_model(model: str | None) -> None:
    if not model:
        raise ValueError("depth of a photo needs a model; give model='depth-anything/Depth-Anything-V2-Small-hf'")


# Edges


def _scene_canny(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    return given.rendering.edges[0].float().expand(3, -1, -1), {}


def _photo_canny(photo: Image.Image, low: int = 100, high: int = 200) -> tuple[torch.Tensor, dict[str, Any]]:
    """Canny's edges, white on black.

    Args:
        photo: the picture.
        low: gradient in [0, 255] from which an edge goes on.
        high: gradient from which one starts.
    """
    found = _opencv().Canny(np.array(photo.convert("L")), low, high)
    return torch.from_numpy(found).float().div(255).expand(3, -1, -1), {"low": low, "high": high}


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("edges of photos need OpenCV; install it with: pip install 'imgdit[vision]'") from error
    return cv2


# Segmentation and boxes


def segmentation_to_picture(classes: torch.Tensor) -> torch.Tensor:
    """Classes (…, H, W), 0 ground and beyond, k the kind `OBJECTS[k - 1]`, to colours (…, 3, H, W) of `PALETTE`."""
    return torch.tensor(PALETTE, device=classes.device)[classes.long()].movedim(-1, -3)


def picture_to_segmentation(picture: torch.Tensor) -> torch.Tensor:
    """Colours (…, 3, H, W) to classes (…, H, W), see `areas_of_colours` and `PALETTE`."""
    return areas_of_colours(picture, torch.tensor(PALETTE, device=picture.device))


def areas_of_colours(picture: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """Pictures (…, 3, H, W) to numbers (…, H, W) of the nearest colours of a palette (P, 3), where areas have them.

    An autoencoder blurs the border of two areas, and half-way between two colours of the palette may lie a third. So
    only a pixel whose neighbours are all of its colour is sure; the number spreads from there to those that are not.
    A picture without a sure pixel is read pixel by pixel.
    """
    apart = (picture.movedim(-3, -1)[..., None, :].float() - palette).square().sum(-1)  # (…, H, W, P)
    nearest = F.one_hot(apart.argmin(-1), len(palette)).movedim(-1, -3).float()
    layers = nearest.reshape(-1, *nearest.shape[-3:])  # (N, P, H, W)
    sure = -F.max_pool2d(-layers, 3, stride=1, padding=1)
    sure = torch.where(sure.flatten(1).any(1)[:, None, None, None], sure, layers)
    while not (known := sure.amax(1, keepdim=True) > 0).all():
        votes = F.avg_pool2d(sure, 3, stride=1, padding=1)
        sure = torch.where(known, sure, votes / votes.sum(1, keepdim=True).clamp_min(1e-6))
    return sure.reshape(nearest.shape).argmax(-3)


def _classes(scene: Scene) -> list[int]:
    return [0, *(OBJECTS.index(thing.kind) + 1 for thing in scene.objects)]


def scene_classes(scene: Scene, indices: torch.Tensor) -> torch.Tensor:
    """Classes of a scene's index map: 0 ground and beyond, k the kind `OBJECTS[k - 1]`."""
    return torch.tensor(_classes(scene), device=indices.device)[indices]


def _scene_segmentation(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    classes = scene_classes(given.scene, given.rendering.indices[0])
    return segmentation_to_picture(classes), {"classes": classes}


def _scene_boxes(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    """A frame around each object and a faint fill, in its kind's colour of `PALETTE`."""
    boxes = given.rendering.boxes[0]
    picture = boxes.new_zeros(3, given.size, given.size)
    width = max(1, round(given.size / 64))
    for box, kind in zip(boxes.long().tolist(), _classes(given.scene)[1:]):
        left, top, right, bottom = box
        colour = picture.new_tensor(PALETTE[kind])[:, None, None]
        inside = picture[:, top:bottom, left:right]
        middle = inside[:, width:-width, width:-width].clone()
        inside[:] = colour
        inside[:, width:-width, width:-width] = torch.maximum(middle, 0.25 * colour)
    return picture, {"boxes": boxes, "kinds": [thing.kind for thing in given.scene.objects]}


# Degraded pictures: the same for scenes and photos


def _blur(picture: torch.Tensor, radius: float) -> torch.Tensor:
    return to_pixels(to_image(picture).filter(ImageFilter.GaussianBlur(radius)))[0].to(picture.device)


def _scene_blur(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    radius = between(given.rng, 2.0, 5.0) * given.size / 128
    return _blur(given.rgb, radius), {"radius": radius}


def _photo_blur(photo: Image.Image, radius: float = 8.0) -> tuple[torch.Tensor, dict[str, Any]]:
    return _blur(to_pixels(photo)[0], radius), {"radius": radius}


def _grey(picture: torch.Tensor) -> torch.Tensor:
    weights = picture.new_tensor((0.299, 0.587, 0.114))[:, None, None]  # ITU-R BT.601, as Pillow's mode L
    return (picture * weights).sum(0, keepdim=True).expand(3, -1, -1)


def _scene_grey(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    return _grey(given.rgb), {}


def _photo_grey(photo: Image.Image) -> tuple[torch.Tensor, dict[str, Any]]:
    return to_pixels(photo.convert("L"))[0], {}


def _with_hole(picture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.where(mask, HOLE, picture), {"mask": mask}


def _scene_mask(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hides one object with some room around it, or a rectangle anywhere."""
    size = given.size
    mask = torch.zeros(1, size, size, dtype=torch.bool, device=given.rgb.device)
    left, top, right, bottom = pick(given.rng, given.rendering.boxes[0, : len(given.scene.objects)].long().tolist())
    if given.rng.random() < 0.5:
        room = round(between(given.rng, 0.0, 0.08) * size)
        mask[:, max(0, top - room) : bottom + room, max(0, left - room) : right + room] = True
    else:
        height, width = (round(between(given.rng, 0.25, 0.6) * size) for _ in range(2))
        row, column = (int(given.rng.random() * (size - n)) for n in (height, width))
        mask[:, row : row + height, column : column + width] = True
    return _with_hole(given.rgb, mask)


def _photo_mask(photo: Image.Image, mask: Image.Image | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hides what is white in `mask`, by default the middle of the picture."""
    if mask is None:
        mask = Image.new("L", photo.size)
        width, height = photo.size
        mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    if mask.size != photo.size:
        raise ValueError(f"the mask has {mask.size} pixels (width, height), the photo {photo.size}; make them equal")
    return _with_hole(to_pixels(photo)[0], mask_values(mask)[None])


def _smaller(photo: Image.Image, factor: int) -> tuple[torch.Tensor, dict[str, Any]]:
    if factor < 2 or min(photo.size) < factor:
        raise ValueError(f"factor must be a whole number from 2 to {min(photo.size)}, got {factor}")
    size = (photo.width // factor, photo.height // factor)
    return to_pixels(photo.resize(size, Image.Resampling.BICUBIC))[0], {"factor": factor}


def _scene_super_resolution(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    small, details = _smaller(to_image(given.rgb), pick(given.rng, (2, 4)))
    return small.to(given.rgb.device), details


def _photo_super_resolution(photo: Image.Image, factor: int = 4) -> tuple[torch.Tensor, dict[str, Any]]:
    return _smaller(photo, factor)


# References: another picture


def _scene_subject(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    """The first object alone elsewhere: its kind and colour stay, camera, background and style are other ones."""
    thing = given.scene.objects[0]
    # No reference shows a held-out triple, whatever the split of the scene: it may be trained on. Neon and sepia would
    # not show the colour well.
    styles = [s for s in ("photo", "cartoon", "sketch", "mosaic") if is_trained(thing.kind, thing.colour, s)]
    reference = draw(
        given.rng,
        allowed=lambda kind, colour, _: (kind, colour) == (thing.kind, thing.colour),
        objects=1,
        style=pick(given.rng, styles),
    )
    return given.render(reference).rgb[0], {"reference": reference}


def _scene_style_reference(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    """Another scene in the same style, with none of the kinds and colours."""
    kinds = {thing.kind for thing in given.scene.objects}
    colours = {thing.colour for thing in given.scene.objects}
    reference = draw(
        given.rng,
        allowed=lambda kind, colour, style: (
            is_trained(kind, colour, style) and kind not in kinds and colour not in colours
        ),
        style=given.scene.style,
    )
    return given.render(reference).rgb[0], {"reference": reference}


def _scene_views(given: _Given) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same scene from another place on the camera's sphere, 10 to 40 degrees around."""
    other = another_camera(given.scene, given.rng)
    seen = given.render(other)
    return seen.rgb[0], {
        "cameras": (other.camera, given.scene.camera),
        "poses": torch.cat([seen.pose, given.rendering.pose]),
        "intrinsics": given.rendering.intrinsics,
    }


TASKS = {
    task.name: task
    for task in (
        Task("canny", "edges, white on black → picture", _scene_canny, _photo_canny, invertible=True),
        Task("depth", "depth, near is white → picture", _scene_depth, _photo_depth, invertible=True),
        Task("segmentation", "a colour for each kind of object → picture", _scene_segmentation, invertible=True),
        Task("boxes", "a coloured frame around each object → picture", _scene_boxes, invertible=True),
        Task("blur", "blurred picture → sharp one", _scene_blur, _photo_blur),
        Task("grey", "grey picture → coloured one", _scene_grey, _photo_grey),
        Task("mask", "picture with a grey hole → whole one", _scene_mask, _photo_mask),
        Task("super_resolution", "small picture → large one", _scene_super_resolution, _photo_super_resolution),
        Task("subject", "an object elsewhere → the scene with it", _scene_subject),
        Task("style_reference", "another scene → this one in its style", _scene_style_reference),
        Task("views", "the scene from another place → from here", _scene_views, invertible=True),
    )
}
"""The tasks by name. Details: `depth` depth (1, H, W), of photos estimate; `canny` low, high of photos; `segmentation`
classes (H, W); `boxes` boxes (2, 4) in pixels and kinds; `blur` radius in pixels; `mask` mask (1, H, W), true where
hidden; `super_resolution` factor; `subject` and `style_reference` reference, the scene shown; `views` cameras, poses
(2, 4, 4) and intrinsics, the condition's first."""
