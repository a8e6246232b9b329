"""Images to another size: scaled until they cover it, cut evenly on both sides; the aspect is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from imgdit.images.convert import to_image, to_pixels, to_rgb

Size = tuple[int, int]
"""Width and height in pixels."""
SHARP = ("segmentation", "boxes")
"""Kinds of images whose colours mean something and must not be blended with their neighbours'."""

LEAST_SIDE = 2
"""Pixels of the shorter side of an image that a model reads."""
LARGEST_ASPECT = 100
"""Of its longer to its shorter side: scaled by the shorter side, a longer one would fill the memory."""


def filter_of(kind: str | None) -> Image.Resampling:
    """The filter by which an image of a kind (depth, segmentation, …) is brought to another size."""
    return Image.Resampling.NEAREST if kind in SHARP else Image.Resampling.LANCZOS


def fit(image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """An image at a size: scaled until it covers it, cut evenly on both sides."""
    return image.resize(size, resample, box=_middle(image.size, size))


def square(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The middle of an image as a square of `side` pixels, see `scale_and_crop`."""
    return scale_and_crop(image, (side, side), resample)


def scale_and_crop(
    image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """An image at a size: scaled to whole pixels of which the shorter side fits, then its middle.

    Unlike `fit` these are the two steps of torchvision's Resize and CenterCrop, which published readers of images use.
    """
    width, height = image.size
    if width * size[1] <= height * size[0]:
        scaled = (size[0], int(size[0] * height / width))
    else:
        scaled = (int(size[1] * width / height), size[1])
    left, top = (round((scaled[n] - size[n]) / 2) for n in (0, 1))
    return image.resize(scaled, resample).crop((left, top, left + size[0], top + size[1]))


def check_sides(size: Size, name: str) -> None:
    """Refuse an image that is too small or too narrow to be read.

    Args:
        name: what the message calls it.

    Raises:
        ValueError: it is.
    """
    short, long = sorted(size)
    if short < LEAST_SIDE or long > LARGEST_ASPECT * short:
        raise ValueError(
            f"{name} has {size[0]}x{size[1]} pixels; images to be read have at least {LEAST_SIDE} on each side, and "
            f"one side at most {LARGEST_ASPECT} times the other. Cut it"
        )


def fit_pixels(
    image: Any,
    size: Size,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    background: str = "white",
) -> torch.Tensor:
    """Anything that `to_pixels` takes as (B, 3, H, W) float32 in [0, 1] of a size, fitted as `fit` does.

    Images of 8 bits are the same whether they come as PIL images, arrays or tensors; one of the size already stays as
    it is.
    """
    if isinstance(image, Image.Image):
        return to_pixels(fit(to_rgb(image, background), size, resample))
    pixels = to_pixels(image, background)
    if (pixels.shape[3], pixels.shape[2]) == size:
        return pixels
    if image.dtype in (torch.uint8, np.uint8):
        return torch.cat([to_pixels(fit(to_image(one), size, resample)) for one in pixels]).to(pixels.device)
    channels = [fit(Image.fromarray(one), size, resample) for one in pixels.flatten(0, 1).cpu().numpy()]
    fitted = torch.from_numpy(np.stack([np.array(channel) for channel in channels])).clamp(0, 1)  # Lanczos overshoots
    return fitted.unflatten(0, (-1, 3)).to(pixels.device)


def cut_off(image: Size, size: Size) -> float:
    """Fraction of an image's area that `fit` leaves out."""
    left, top, right, bottom = _middle(image, size)
    return 1 - (right - left) * (bottom - top) / (image[0] * image[1])


def _middle(image: Size, size: Size) -> tuple[float, float, float, float]:
    """The largest part of an image's middle that has a size's aspect: left, top, right, bottom."""
    scale = max(size[0] / image[0], size[1] / image[1])
    width, height = size[0] / scale, size[1] / scale
    left, top = (image[0] - width) / 2, (image[1] - height) / 2
    return left, top, left + width, top + height
