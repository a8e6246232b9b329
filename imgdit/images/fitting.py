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


def filter_of(kind: str | None) -> Image.Resampling:
    """The filter by which an image of a kind (depth, segmentation, …) is brought to another size."""
    return Image.Resampling.NEAREST if kind in SHARP else Image.Resampling.LANCZOS


def fit(image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """An image at a size: scaled until it covers it, cut evenly on both sides."""
    return image.resize(size, resample, box=_middle(image.size, size))


def square(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The middle of an image as a square: the shorter side scaled to `side` pixels, the longer one alike and
    rounded down, then cut. Unlike `fit`, in two steps, as torchvision's `Resize` and `CenterCrop` do."""
    width, height = (int(side * length / min(image.size)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.resize((width, height), resample).crop((left, top, left + side, top + side))


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
    made = torch.from_numpy(np.stack([np.array(channel) for channel in channels])).clamp(0, 1)  # Lanczos overshoots
    return made.unflatten(0, (-1, 3)).to(pixels.device)


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
