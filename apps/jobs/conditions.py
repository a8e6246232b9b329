"""From a photo to the condition that is in it: edges, depth, a hole, …"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps, ImageStat

from imgdit.apps.jobs.request import Request, RequestFrame, fitted
from imgdit.images import fit, to_image, to_rgb
from imgdit.scenes.tasks import SCENE_TASKS, from_photo

SIMPLE = ("blur", "grey", "mask", "super_resolution")
"""Conditions that are the photo with something taken away."""
MAPS = ("canny", "depth", "segmentation", "boxes")
"""Conditions that have to be found in a photo."""

LINES = ("canny", "hed")
"""Maps of white lines on black."""
LIGHT = (*LINES, "depth")
"""Maps in which nothing is black, and what is there is light."""
COLOURED = ("segmentation", "boxes")
"""Maps in which nothing is black, and a colour says what is there."""


def condition_of(
    session: Any,
    kind: str,
    photo: Image.Image,
    mask: Image.Image | None = None,
    size: tuple[int | None, int | None] = (None, None),
    caption: str = "",
) -> Image.Image:
    """The condition of a photo; the photo itself where the kind takes photos (subject, style_reference, editing).

    A model that was taught to find a map in an image is asked for it, as it knows what it will be given; edges are
    otherwise found by OpenCV.

    Args:
        session: the `Session` of the model.
        kind: of the condition.
        photo: what it is found in.
        mask: white where the hole of "mask" is; the middle of the photo by default.
        size: height and width in pixels of the image that is generated, which the photo is cut to; `None`: the
            model's own.
        caption: of the photo; a segmentation has the right colours only where it names what is seen.

    Raises:
        ValueError: nothing here finds this kind in a photo.
    """
    height, width = (side or session.default_size for side in size)
    photo = fitted(photo, "image", height, width)
    if kind in MAPS and kind in session.shelf.tasks:
        frames = (RequestFrame(image=photo), RequestFrame(kind))
        return session.generate(Request(caption, frames=frames, steps=20, height=size[0], width=size[1])).images[0]
    if kind in SIMPLE or kind == "canny":
        options: dict[str, Any] = {}
        if kind == "mask" and mask is not None:
            options["mask"] = fit(to_rgb(mask), photo.size, Image.Resampling.NEAREST).convert("L")
        return to_image(from_photo(kind, photo, **options).condition)
    if kind in SCENE_TASKS and kind in MAPS:
        raise ValueError(
            f"{kind} is not found in photos by this model; give the {kind} image itself, made by a tool of yours"
        )
    return photo


def drawn_map(kind: str, drawing: Image.Image, strokes: Image.Image) -> tuple[Image.Image, bool]:
    """A drawing on paper as a map of some kind is read, and whether it was inverted.

    Maps have black where there is nothing, paper is white. Dark strokes of edges and depth become light on black;
    where colours have a meaning, strokes keep theirs and the paper becomes black. On black paper nothing is inverted.

    Args:
        kind: of the map; what is no map stays as it is.
        drawing: as it is seen.
        strokes: in RGBA, without the paper.

    Raises:
        ValueError: nothing but black, where a colour says what is there.
    """
    if kind in LIGHT:
        paper = strokes.getchannel("A").point(lambda alpha: 0 if alpha else 255)
        light = paper.getbbox() is None or ImageStat.Stat(drawing.convert("L"), paper).mean[0] > 127
        return (ImageOps.invert(drawing.convert("RGB")), True) if light else (drawing, False)
    if kind in COLOURED:
        # No soft edges: they would mix colours to others.
        hard = strokes.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
        made = Image.composite(strokes.convert("RGB"), Image.new("RGB", strokes.size), hard)
        if made.getbbox() is None:
            raise ValueError(f"{kind} is drawn in colours that say what is there; choose one for the brush")
        return made, False
    return drawing, False


def lines_on_black(kind: str, image: Image.Image) -> tuple[Image.Image, bool]:
    """A finished map, and whether it was inverted: lines on a ground that is mostly light, as people draw them."""
    if kind in LINES and ImageStat.Stat(image.convert("L")).median[0] > 127:
        return ImageOps.invert(image.convert("RGB")), True
    return image, False
