"""Images to latents and back, with any of diffusers' autoencoders.

B batch, H x W pixels, C channels, h x w latent cells.
"""

from __future__ import annotations

from typing import Any

import torch


def encode_images(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] to the most likely latents (B, C, h, w), scaled and shifted."""
    encoded = vae.encode(pixels.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return scale_latents(vae, latents)


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """An autoencoder's raw latents (B, C, h, w) as models take them."""
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


def unscale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as models give them to what the decoder takes."""
    return latents / vae.config.scaling_factor + _shift(vae)


def cell_size(vae: Any) -> int:
    """Pixels per side of a latent cell; 8 where there is no autoencoder."""
    if vae is None:
        return 8
    ratio = getattr(vae, "spatial_compression_ratio", None)  # AutoencoderDC and others tell; AutoencoderKL does not
    return ratio if ratio is not None else 2 ** (len(vae.config.block_out_channels) - 1)


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W), in [-1, 1] but for what the decoder overshoots."""
    return vae.decode(unscale_latents(vae, latents).to(vae.dtype)).sample.float()


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
