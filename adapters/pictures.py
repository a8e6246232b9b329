"""What a person gives as a picture or a mask, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image


def to_pixels(image: Any) -> torch.Tensor:
    """A picture as (B, 3, H, W) in [-1, 1].

    Args:
        image: PIL picture of any mode; array (H, W), (H, W, 1), (H, W, 3) or (B, H, W, 3), uint8 or in [0, 1]; tensor
            (3, H, W) or (B, 3, H, W), uint8 or in [0, 1].
    """
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(image))
        if values.ndim == 2:
            values = values[..., None]
        values = values.movedim(-1, -3)
    elif isinstance(image, torch.Tensor):
        values = image
    else:
        raise ValueError(f"a condition's image is a PIL picture, an array or a tensor, got {type(image).__name__}")
    values = values[None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise ValueError(
            f"got an image of shape {tuple(image.shape)}; expected (H, W, 3) for an array, (3, H, W) for a tensor"
        )
    unit = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if not (unit.min() >= 0 and unit.max() <= 1):
        raise ValueError(
            f"an image that is not uint8 has values in [0, 1], got {unit.min():.3g} to {unit.max():.3g}; scale it"
        )
    return (unit * 2 - 1).expand(-1, 3, -1, -1)


def to_mask(mask: Any, size: tuple[int, int], patch: int) -> torch.Tensor:
    """A boolean mask over tokens.

    Args:
        mask: PIL picture, array or tensor; above half of its range is true. Over tokens or over pixels.
        size: rows and columns of tokens.
        patch: pixels per side of a token, which is true if all its pixels are.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L"))
    values = torch.as_tensor(mask)
    if values.dtype != torch.bool:
        values = values > (127 if values.dtype == torch.uint8 else 0.5)
    pixels = (size[0] * patch, size[1] * patch)
    if tuple(values.shape) == pixels:
        values = values.view(size[0], patch, size[1], patch).all(dim=3).all(dim=1)
    if tuple(values.shape) != tuple(size):
        raise ValueError(
            f"got a mask of shape {tuple(values.shape)}; its image has {size[0]}x{size[1]} tokens (rows x columns) "
            f"and {pixels[0]}x{pixels[1]} pixels, the mask must have one of these sizes"
        )
    if not values.any():
        raise ValueError("the mask leaves no token of the condition; leave the condition out instead")
    return values
