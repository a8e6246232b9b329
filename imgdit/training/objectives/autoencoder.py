"""Reconstruction of images."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Images, ObjectiveOutput


def autoencoder(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler | None,
    batch: Images,
    generator: torch.Generator | None,
    *,
    square_weight: float = 1.0,
    gradient_weight: float = 0.5,
    kl_weight: float = 1e-6,
    latent_noise: float = 0.1,
) -> ObjectiveOutput:
    """Reconstruction of images: absolute and squared error of pixels, absolute error of their differences at three
    scales, and the divergence of the latent distribution from a normal one.

    The differences make edges sharp without a perceptual network, which could not be had offline.

    Args:
        model: `AutoencoderKL`, or `AutoencoderDC`, whose latent z counts as a normal distribution N(z, latent_noise²);
            wrapped for distributed training or not.
        scheduler: not used.
        batch: images.
        generator: source of the latent's draw; in evaluation the mode is decoded.
        square_weight: of the squared error.
        gradient_weight: of the differences.
        kl_weight: of the divergence, per latent value.
        latent_noise: standard deviation of an `AutoencoderDC`'s latent, so that the decoder bears what a sampler gets
            slightly wrong.
    """
    latent, reconstruction = _reconstruct(model, batch.pixels, generator, latent_noise)
    weight = 1.0 if batch.weight is None else batch.weight
    error = reconstruction - batch.pixels
    pixel = (weight * error.abs()).mean()
    square = (weight * error.square()).mean()
    edges = _difference_error(reconstruction, batch.pixels)
    kl = latent.kl().mean() / latent.mean[0].numel()
    loss = pixel + square_weight * square + gradient_weight * edges + kl_weight * kl
    return ObjectiveOutput(
        loss, {"pixel": pixel.detach(), "square": square.detach(), "edges": edges.detach(), "kl": kl.detach()}
    )


def _reconstruct(
    model: torch.nn.Module, pixels: torch.Tensor, generator: torch.Generator | None, latent_noise: float
) -> tuple[DiagonalGaussianDistribution, torch.Tensor]:
    """Latent distribution and reconstruction (B, 3, H, W).

    `forward` keeps the latent to itself, and calling `encode` and `decode` would go past the wrappers (DDP's
    gradients, autocast) that sit on `forward`. So the latent is read, and an `AutoencoderDC`'s drawn, on the way.
    """
    core = extract_model_from_parallel(model)
    own_draw = isinstance(core, AutoencoderDC)
    seen: list[torch.Tensor] = []

    def read(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        if not own_draw or not model.training:
            return output
        noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output + latent_noise * noise

    last = core.encoder if getattr(core, "quant_conv", None) is None else core.quant_conv
    handle = last.register_forward_hook(read)
    try:
        options = {} if own_draw else {"sample_posterior": model.training, "generator": generator}
        reconstruction = model(pixels, **options).sample
    finally:
        handle.remove()
    moments = seen[0].float()
    if own_draw:
        log_variance = torch.full_like(moments, 2 * math.log(max(latent_noise, 1e-6)))
        moments = torch.cat([moments, log_variance], dim=1)
    return DiagonalGaussianDistribution(moments), reconstruction.float()


def _difference_error(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Absolute error of the differences of neighbouring pixels, at full, half and quarter size."""
    error = generated.new_zeros(())
    for scale in range(3):
        if scale:
            generated, real = F.avg_pool2d(generated, 2), F.avg_pool2d(real, 2)
        for dim in (-1, -2):
            error = error + (generated.diff(dim=dim) - real.diff(dim=dim)).abs().mean()
    return error / 6
