"""Image to image: a run that begins at an image under some noise instead of at noise alone (SDEdit, arXiv 2108.01073).

B samples, H x W pixels, C channels, h x w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch

from imgdit.adapters.pairing import Samples
from imgdit.images.fitting import fit_pixels
from imgdit.images.latents import encode_images
from imgdit.naming import shown


class StartImage(NamedTuple):
    """The image that a call begins at, read and checked."""

    pixels: torch.Tensor
    """(B, 3, H, W) in [0, 1]."""
    strength: float
    """Fraction of the steps that run; see `late_start`."""

    @classmethod
    def read(cls, image: Any, strength: Any, size: tuple[int, int], samples: Samples) -> StartImage:
        """Read the arguments `image` and `strength` of a call.

        Args:
            image: what `imgdit.images.to_pixels` takes, or a list of PIL images: one for all samples, one per prompt
                or one per sample. Scaled and cut to the size.
            strength: above 0 and at most 1.
            size: height and width in pixels.
            samples: of the call.

        Raises:
            ValueError: another strength, another number of images, or an image that cannot be read.
        """
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < float(strength) <= 1:
            raise ValueError(
                f"strength must be above 0 and at most 1, the fraction of the steps that run; got {shown(strength)}"
            )
        images = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
        if not images:
            raise ValueError("image is an empty list; give one image, or leave image out")
        pixels = torch.cat([fit_pixels(one, (size[1], size[0])) for one in images])
        if len(pixels) not in (1, samples.prompts, samples.count):
            raise ValueError(
                f"image holds {len(pixels)} images for {samples.prompts} prompt(s) and {samples.count} sample(s); "
                "give one for all, one per prompt, or one per sample"
            )
        return cls(pixels[list(samples.order(len(pixels)))], float(strength))

    def under_noise(self, vae: Any, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """(B, C, h, w) float32: the image's most likely latents under noise, `(1 - sigma) * data + sigma * noise`.

        Args:
            vae: autoencoder.
            noise: (B, C, h, w).
            sigma: noise level in [0, 1].
        """
        data = encode_images(vae, self.pixels.to(noise.device) * 2 - 1).float()
        return (1 - sigma) * data + sigma * noise


def late_start(scheduler: Any, timesteps: torch.Tensor, strength: float) -> tuple[torch.Tensor, float]:
    """Let a run begin late in its schedule, as diffusers' image-to-image pipelines do: `ceil(strength * steps)` steps
    are left.

    Args:
        scheduler: with its steps set; its begin index is moved.
        timesteps: of the whole schedule.
        strength: above 0 and at most 1, where all steps are left.

    Returns:
        the timesteps that are left, and the noise level in [0, 1] at the first of them.
    """
    order = scheduler.order  # predictions per step
    steps = math.ceil(len(timesteps) / order)
    first = int(steps - min(steps * strength, steps)) * order
    scheduler.set_begin_index(first)
    return timesteps[first:], float(scheduler.sigmas[first])
