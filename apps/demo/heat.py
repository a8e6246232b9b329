"""Heat maps over pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def overlay(picture: Image.Image, heat: torch.Tensor, full: float = 0.0) -> Image.Image:
    """A grey picture under a map.

    Args:
        picture: of any size.
        heat: (rows, columns), not negative; 0 is the picture alone.
        full: what is red; the largest value, where that is larger.
    """
    top = max(float(heat.max()), full)
    share = (heat.float() / top if top > 0 else heat.float()).clamp(0, 1).numpy()
    mask = Image.fromarray((share * 220).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    red = Image.new("RGB", picture.size, (239, 68, 68))
    return Image.composite(red, picture.convert("L").convert("RGB"), mask)
