"""Conditions as tokens: images through the autoencoder, packed as the transformer reads them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from imgdit.adapters.condition import Condition
from imgdit.adapters.pairing import UNKNOWN, Target
from imgdit.family import TokenFormat, find_family
from imgdit.frames import Frame
from imgdit.images.convert import image_size
from imgdit.images.fitting import cut_off, fit_pixels
from imgdit.images.latents import cell_size

logger = logging.getLogger(__name__)

CUT = 0.05
"""Fraction of a condition's area that may be cut off without a warning."""


class EncodedCondition(NamedTuple):
    """A condition that is ready to ride behind the image tokens."""

    condition: Condition
    frame: Frame
    tokens: torch.Tensor
    """(b, n, C), b = 1 or one image per sample."""
    empty: torch.Tensor | None
    """The same of an all-black image, where image guidance compares with it."""
    source_size: tuple[int, int]
    """Height and width of the image before it was fitted."""
    target: tuple[int, int] | None = None
    """Rows and columns of tokens of the image that is generated, which it was placed for; `None`: not known."""


def token_format(model: Any) -> TokenFormat:
    """How images become condition tokens of a transformer.

    Raises:
        ValueError: nothing is known of that.
    """
    family = find_family(model)
    if family is None or family.tokens is None:
        raise ValueError(f"a {type(model).__name__} takes no condition tokens")
    return family.tokens


def token_side(model: Any, vae: Any) -> int:
    """Pixels per side of a token of a transformer's images.

    Args:
        model: the bare transformer.
        vae: diffusers' autoencoder; `None`: cells of 8 pixels.

    Raises:
        ValueError: nothing is known of the transformer's tokens.
    """
    return token_format(model).patch(model, vae) * cell_size(vae)


def encode_conditions(
    model: Any,
    vae: Any,
    conditions: Sequence[Condition],
    sees: Sequence[Any],
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
    with_empty: bool = False,
    target: Target = UNKNOWN,
    sharp: Collection[str] = (),
) -> list[EncodedCondition]:
    """Encode conditions.

    Args:
        model: the bare transformer.
        vae: diffusers' autoencoder.
        sees: "joint" or "self" for each condition.
        generator: draws from the posterior; `None` takes its mode.
        with_empty: encode a black image of each size as well.
        target: what is generated; where its size is not known, conditions keep their own.
        sharp: adapters whose conditions' colours mean something and are not blended.
    """
    written = token_format(model)
    side = cell_size(vae) * written.patch(model, vae)
    encoded = []
    for condition, view in zip(conditions, sees, strict=True):
        how = Image.Resampling.NEAREST if condition.adapter in sharp else Image.Resampling.LANCZOS
        pixels, source_size = read_condition(condition, side, target.grid, how)
        if target.samples is not None:
            target.samples.order(len(pixels))  # refuses another number
        height, width = pixels.shape[-2:]
        frame = condition.frame((height // side, width // side), side, view, source_size, target.grid)

        def tokens(pixels: torch.Tensor, frame: Frame = frame) -> torch.Tensor:
            packed = written.encode(model, vae, pixels.to(device, vae.dtype), generator)  # (b, rows * columns, C)
            return packed if frame.mask is None else packed[:, frame.mask.flatten()]

        black = tokens(torch.full_like(pixels[:1], -1.0)) if with_empty else None
        encoded.append(EncodedCondition(condition, frame, tokens(pixels), black, source_size, target.grid))
    return encoded


def read_condition(
    condition: Condition, side: int, target: tuple[int, int] | None, resample: Image.Resampling
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A condition's images (b, 3, H, W) in [-1, 1] at the size they are read at, and the height and width of the first
    before.

    Args:
        condition: whose image may be several in a list.
        side: pixels per side of a token.
        target: rows and columns of tokens of the image that is generated; `None`: not known.
        resample: filter of another size.
    """
    images = condition.image if isinstance(condition.image, (list, tuple)) else [condition.image]
    if not images:
        raise ValueError(f"the condition of {condition.adapter!r} is an empty list; give an image")
    sizes = [image_size(image) for image in images]
    read = [condition.read_size(size, side, target) for size in sizes]
    if condition.position == "aligned":  # of an image whose size is not known the first one's, till it is
        read = read[:1]
    if len(set(read)) > 1:
        raise ValueError(
            f"the images of a condition are of one size, got {', '.join(f'{h}x{w}' for h, w in read)} pixels; give "
            "them in one, or put them over the image (position='aligned'), which they are fitted to"
        )
    height, width = read[0]
    lost = max(cut_off(size[::-1], (width, height)) for size in sizes)
    if lost > CUT and (target is not None or condition.position != "aligned"):
        logger.warning(
            "a condition of %r has another aspect than the %dx%d pixels (height x width) it is read at: %.0f %% of "
            "its area lies outside and is cut off",
            condition.adapter, height, width, lost * 100,
        )  # fmt: skip
    pixels = torch.cat([fit_pixels(image, (width, height), resample) for image in images])
    return pixels * 2 - 1, sizes[0]
