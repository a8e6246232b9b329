"""Conditions as tokens: pictures through the autoencoder, packed as the transformer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from imgdit.images.convert import to_pixels

from ..frames import Frame
from ..models.autoencoding import cell_size, encode_pictures, scale_latents
from ..models.functional import pack
from .condition import Condition


class Encoded(NamedTuple):
    """A condition that is ready to ride behind the image tokens."""

    condition: Condition
    frame: Frame
    tokens: torch.Tensor
    """(b, n, C), b = 1 or one picture per sample."""
    empty: torch.Tensor | None
    """The same of an all-black picture, where image guidance compares with it."""


def encode_conditions(
    vae: Any,
    conditions: Sequence[Condition],
    sees: Sequence[Any],
    *,
    patch: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    with_empty: bool = False,
) -> list[Encoded]:
    """Encode conditions.

    Args:
        vae: diffusers' autoencoder.
        sees: "joint" or "self" for each condition.
        patch: latent cells per side of a token.
        generator: draws from the posterior; `None` takes its mode.
        with_empty: encode a black picture of each size as well.
    """
    side = cell_size(vae) * patch
    encoded = []
    for condition, view in zip(conditions, sees, strict=True):
        pixels = to_pixels(condition.image) * 2 - 1
        height, width = pixels.shape[-2:]
        if height < side or width < side or height % side or width % side:
            fitting = (max(height // side, 1) * side, max(width // side, 1) * side)
            raise ValueError(
                f"a condition's picture must be a multiple of {side} pixels high and wide, got {height}x{width}; "
                f"resize it to {fitting[0]}x{fitting[1]}"
            )
        frame = condition.frame((height // side, width // side), side, view)

        def tokens(pixels: torch.Tensor, frame: Frame = frame) -> torch.Tensor:
            packed = pack(_latents(vae, pixels.to(device, vae.dtype), generator), patch)  # (b, rows * columns, C)
            return packed if frame.mask is None else packed[:, frame.mask.flatten()]

        black = tokens(torch.full_like(pixels[:1], -1.0)) if with_empty else None
        encoded.append(Encoded(condition, frame, tokens(pixels), black))
    return encoded


def _latents(vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    if generator is None:
        return encode_pictures(vae, pixels)
    posterior = vae.encode(pixels).latent_dist
    noise = randn_tensor(posterior.mean.shape, generator=generator, device=pixels.device, dtype=pixels.dtype)
    return scale_latents(vae, posterior.mean + posterior.std * noise)
