"""What a person gives as a mask, as booleans.

White (true) is what counts: above half of the range of its type, which `imgdit.images.convert` tells.
Three things are read as people write them:

- whole numbers that are only 0 and one other value, such as 0 and 1: what is not 0 counts;
- an image with transparent parts: what is opaque counts, whatever its colour;
- a colour image: its brightness counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from imgdit.images.convert import channels_first, to_rgba, to_unit
from imgdit.images.fitting import fit
from imgdit.images.opening import upright

SAME_SHAPE = 0.02
"""How far, as a fraction, the aspect of a mask may be from its image's."""


def to_mask(
    mask: Any, size: tuple[int, int], patch: int = 1, source_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """A boolean mask over tokens (rows, columns).

    Args:
        mask: PIL image of any mode, array (H, W) or (H, W, C), or tensor (H, W) or (C, H, W); over tokens, or over
            pixels of any number with the aspect of its image, which it is fitted to.
        size: rows and columns of tokens.
        patch: pixels per side of a token, which is true if all its pixels are.
        given: height and width of the image it belongs to, if that was fitted to its tokens.

    Raises:
        ValueError: a mask of another shape, of values whose meaning is not known, or with nothing true in it.
    """
    values = mask_values(mask)
    shape, pixels = tuple(values.shape), (size[0] * patch, size[1] * patch)
    if shape != tuple(size):
        if shape != pixels and (
            shape == source_size or abs(shape[0] * pixels[1] / (shape[1] * pixels[0]) - 1) < SAME_SHAPE
        ):
            image = Image.fromarray(values.cpu().numpy().astype(np.uint8))
            fitted = np.array(fit(image, pixels[::-1], Image.Resampling.NEAREST))
            values = torch.from_numpy(fitted).to(values.device, torch.bool)
        if tuple(values.shape) != pixels:
            raise ValueError(
                f"got a mask of shape {shape}; its image has {size[0]}x{size[1]} tokens (rows x columns) and "
                f"{pixels[0]}x{pixels[1]} pixels, the mask must have one of these sizes, or the aspect of the pixels"
            )
        values = values.view(size[0], patch, size[1], patch).all(dim=3).all(dim=1)
    if not values.any():
        raise ValueError(
            "the mask leaves no token of the condition (white counts, and a token where all its pixels do); "
            "leave the condition out instead"
        )
    return values


def mask_values(mask: Any) -> torch.Tensor:
    """A mask's pixels (H, W), true where it is white; see the module."""
    if isinstance(mask, Image.Image):
        return _of_image(mask)
    if isinstance(mask, (list, tuple)):
        mask = torch.as_tensor(mask)
    values = channels_first(mask, "a mask")
    if len(values) != 1:
        raise ValueError(f"one mask serves all samples, got {len(values)}; give one of shape (H, W)")
    if values.shape[1] in (2, 4):
        opacity = to_unit(values[:, -1:], "a mask")[0, 0]
        if not (opacity > 0.5).all():
            return _opaque(opacity > 0.5, to_unit(values[:, :-1], "a mask").mean(1)[0])
        values = values[:, :-1]
    if values.dtype == torch.bool:
        return values[0].any(0)
    if values.dtype.is_floating_point:
        return to_unit(values, "a mask").mean(1)[0] > 0.5
    whole = values.to(torch.int64)[0].amax(0)
    if whole.min() < 0:
        raise ValueError(f"a mask has no negative values, got {int(whole.min())}; what counts is white")
    if ((whole == 0) | (whole == whole.max())).all():
        return whole > 0
    return to_unit(values, "a mask").mean(1)[0] > 0.5


def _of_image(mask: Image.Image) -> torch.Tensor:
    if mask.mode.startswith(("I", "F")):  # as they are: two values of 16 bits may be one of 8
        return mask_values(np.array(upright(mask)))
    image = to_rgba(mask)
    grey = torch.from_numpy(np.array(image.convert("RGB").convert("L")))
    if image.mode == "RGBA":
        opaque = torch.from_numpy(np.array(image.getchannel("A"))) > 127
        if not opaque.all():
            return _opaque(opaque, grey / 255)
    return mask_values(grey)


def _opaque(opaque: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
    """The opaque part of a mask, unless black and white say something else within it."""
    within = light[opaque]
    if ((within == 0) | (within == 1)).all() and len(within.unique()) == 2:
        raise ValueError(
            "the mask is black and white and has transparent parts as well, so that it may mean two things; give it "
            "without transparency (white counts), or in one colour (what is opaque counts)"
        )
    return opaque
