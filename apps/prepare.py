"""From a photo to the condition that is in it: edges, depth, a hole, …"""

from __future__ import annotations

from typing import Any

from PIL import Image

from imgdit.data.tasks import TASKS as PHOTO_TASKS
from imgdit.data.tasks import from_photo
from imgdit.images import fit, to_image, to_rgb

from .request import AskedFrame, Request, fitted

SIMPLE = ("blur", "grey", "mask", "super_resolution")
"""Conditions that are the photo with something taken away."""
MAPS = ("canny", "depth", "segmentation", "boxes")
"""Conditions that have to be found in a photo."""


def condition_of(
    studio: Any,
    kind: str,
    photo: Image.Image,
    mask: Image.Image | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> Image.Image:
    """The condition of a photo; the photo itself where the kind takes photos (subject, style_reference, editing).

    A model that was taught to find a map in a picture is asked for it, as it knows what it will be given; edges are
    otherwise found by OpenCV.

    Args:
        studio: the `Studio` of the model.
        kind: of the condition.
        photo: what it is found in.
        mask: white where the hole of "mask" is; the middle of the photo by default.
        size: height and width in pixels of the image that is generated, which the photo is cut to; `None`: the
            model's own.

    Raises:
        ValueError: nothing here finds this kind in a photo.
    """
    height, width = (side or studio.default_size for side in size)
    photo = fitted(photo, "image", height, width)
    if kind in MAPS and kind in studio.tasks:
        found = studio.make(
            Request(frames=(AskedFrame(picture=photo), AskedFrame(kind)), steps=20, height=size[0], width=size[1])
        )
        return found.pictures[0]
    if kind in SIMPLE or kind == "canny":
        options: dict[str, Any] = {}
        if kind == "mask" and mask is not None:
            options["mask"] = fit(to_rgb(mask), photo.size, Image.Resampling.NEAREST).convert("L")
        return to_image(from_photo(kind, photo, **options).condition)
    if kind in PHOTO_TASKS and kind in MAPS:
        raise ValueError(
            f"{kind} is not found in photos by this model; give the {kind} picture itself, made by a tool of yours"
        )
    return photo
