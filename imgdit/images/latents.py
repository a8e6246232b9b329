"""Images to latents and back, with any of diffusers' autoencoders.

B batch, H x W pixels, C channels, h x w latent cells.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor


def encode_images(vae: Any, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), scaled and shifted.

    Args:
        generator: draws from the posterior; `None` takes its mode.
    """
    pixels = pixels.to(vae.dtype)
    if not _is_film(vae):
        return scale_latents(vae, encode_raw(vae, pixels, generator))
    channels = getattr(vae.config, "input_channels", None) or getattr(vae.config, "in_channels", 3)
    if channels == 4:  # with opacity, which an image without it has in full
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    return scale_latents(vae, encode_raw(vae, pixels[:, :, None], generator)[:, :, 0])


def encode_raw(vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """What an autoencoder gives for images (B, …, H, W), neither scaled nor shifted; see `encode_images`."""
    encoded = vae.encode(pixels)
    if not hasattr(encoded, "latent_dist"):
        return encoded.latent
    posterior = encoded.latent_dist
    if generator is None:
        return posterior.mode()
    noise = randn_tensor(posterior.mean.shape, generator=generator, device=pixels.device, dtype=pixels.dtype)
    return posterior.mean + posterior.std * noise


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """An autoencoder's raw latents (B, C, h, w) as models take them."""
    if _is_film(vae):
        mean, deviation = _statistics(vae, latents)
        return (latents.float() - mean) / deviation
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


def unscale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as models give them to what the decoder takes."""
    if _is_film(vae):
        mean, deviation = _statistics(vae, latents)
        return latents * deviation + mean
    return latents / vae.config.scaling_factor + _shift(vae)


def cell_size(vae: Any) -> int:
    """Pixels per side of a latent cell; 8 where there is no autoencoder."""
    if vae is None:
        return 8
    ratio = getattr(vae, "spatial_compression_ratio", None)  # AutoencoderDC and others tell; AutoencoderKL does not
    return ratio if ratio is not None else 2 ** (len(vae.config.block_out_channels) - 1)


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W), in [-1, 1] but for what the decoder overshoots."""
    latents = unscale_latents(vae, latents).to(vae.dtype)
    if _is_film(vae):
        return vae.decode(latents[:, :, None]).sample[:, :3, 0].float()
    return vae.decode(latents).sample.float()


def _is_film(vae: Any) -> bool:
    """Whether an autoencoder takes films (B, C, frames, H, W), of which an image is one frame (Qwen-Image)."""
    return hasattr(vae.config, "temperal_downsample")


def _statistics(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation (2, C, 1, 1) of the latents' channels."""
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
    return statistics.to(latents.device)[..., None, None]


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
