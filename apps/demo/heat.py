"""Heat maps over images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def overlay(image: Image.Image, heat: torch.Tensor, full: float = 0.0) -> Image.Image:
    """A grey image under a map.

    Args:
        image: of any size.
        heat: (rows, columns), not negative; 0 is the image alone.
        full: what is red; the largest value, where that is larger.
    """
    top = max(float(heat.max()), full)
    fraction = (heat.float() / top if top > 0 else heat.float()).clamp(0, 1).numpy()
    mask = Image.fromarray((fraction * 220).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    red = Image.new("RGB", image.size, (239, 68, 68))
    return Image.composite(red, image.convert("L").convert("RGB"), mask)


def beside(image: Image.Image, other: Image.Image) -> Image.Image:
    """Two images of one height in one, left and right.

    Args:
        image: the left one.
        other: of the same height.
    """
    both = Image.new("RGB", (image.width + other.width, image.height))
    both.paste(image, (0, 0))
    both.paste(other, (image.width, 0))
    return both
