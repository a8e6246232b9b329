"""Heat maps over pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def overlay(picture: Image.Image, heat: torch.Tensor) -> Image.Image:
    """A grey picture under a map.

    Args:
        picture: of any size.
        heat: (rows, columns), not negative; its largest value is red, 0 is the picture alone.
    """
    top = float(heat.max())
    share = (heat.float() / top if top > 0 else heat.float()).clamp(0, 1).numpy()
    mask = Image.fromarray((share * 220).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    red = Image.new("RGB", picture.size, (239, 68, 68))
    return Image.composite(red, picture.convert("L").convert("RGB"), mask)
