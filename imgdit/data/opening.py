"""Encoded images of people's data to 8-bit RGB, and what had to be done to them."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from imgdit.images.convert import notes_of, to_rgb
from imgdit.images.opening import decode, readable, upright
from imgdit.naming import old_names


@old_names(picture="image")
class Opened(NamedTuple):
    """An image that can be trained on."""

    image: Image.Image
    """RGB, as a viewer shows it; of an animation the first frame, behind what is transparent white."""
    notes: tuple[str, ...]
    """What had to be done: "rotated", "alpha", "16 bit", "cmyk", "animated"."""


def decode_image(data: bytes) -> Opened:
    """Decode an image, by the rules of `imgdit.images.convert`.

    Raises:
        ValueError: no image, a damaged one, or one whose values have no known scale.
    """
    name = "the image"
    with decode(data, name) as image, readable(name):
        notes = notes_of(image)
        return Opened(to_rgb(upright(image), name=name), notes)
