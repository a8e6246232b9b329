"""Encoded pictures of any kind to 8-bit RGB, upright, without transparency."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112
"""EXIF tag."""


class Opened(NamedTuple):
    """A picture that can be trained on."""

    picture: Image.Image
    """RGB, as a viewer shows it; of an animation the first frame, behind what is transparent white."""
    notes: tuple[str, ...]
    """What had to be done: "rotated", "alpha", "16 bit", "cmyk", "animated"."""


def open_picture(data: bytes) -> Opened:
    """Decode a picture.

    Raises:
        ValueError: no picture, a damaged one, or one whose values have no known scale.
    """
    notes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(data))
        if getattr(picture, "is_animated", False):
            notes.append("animated")
        picture.load()
        if picture.getexif().get(ORIENTATION, 1) not in (0, 1):
            notes.append("rotated")
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            notes.append("16 bit")
            picture = _narrow(picture)
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            notes.append("alpha")
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        if picture.mode == "CMYK":
            notes.append("cmyk")
            picture = _from_cmyk(picture)
        if picture.mode == "F":
            raise ValueError("its values are floating-point numbers, whose black and white are not known")
        return Opened(picture.convert("RGB"), tuple(notes))
    except Image.DecompressionBombWarning as error:
        raise ValueError(f"the picture is too large: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers let out whatever damage does to them: IndexError, struct.error, …
        raise ValueError(f"the picture is damaged or no picture: {error}") from error


def _narrow(picture: Image.Image) -> Image.Image:
    """16 bits to 8; Pillow's own conversion cuts off what is above 255."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are {values.min()} to {values.max()}, not 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _from_cmyk(picture: Image.Image) -> Image.Image:
    """Through the picture's own profile, if it has a sound one."""
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            made = ImageCms.profileToProfile(
                picture, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if made is not None:
                return made
        except ImageCms.PyCMSError:
            pass  # a damaged profile costs the colours' exact shade, not the picture
    return picture.convert("RGB")
