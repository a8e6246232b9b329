"""An attack on unlearning: text vectors before a prompt, found by gradient, that bring the concept back.

B images, K prefix tokens, T text tokens, J text features, σ the noise level in [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch

from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.models.functional import pack


def attack_prompt(
    pipe: Any,
    prompt: str,
    latents: torch.Tensor,
    *,
    tokens: int = 3,
    steps: int = 40,
    lr: float = 0.05,
    samples: int = 4,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The prompt with a prefix under which the pipeline, as it now is, predicts an image of the concept best.

    As UnlearnDiffAtk (arXiv 2310.11868), which asks the unlearned model itself to denoise one image of the concept;
    but the prefix is free in the space of the text encoder's output, which is stronger than choosing words. The
    gradient goes through hooks and changed weights. Guidance takes no part in it.

    Args:
        pipe: an `ImgDiTPipeline`, with the method under attack attached.
        prompt: that names the concept.
        latents: (1, C, h, w) of an image that shows it, as the pipeline returns them.
        tokens: K.
        steps: of Adam.
        lr: as a fraction of the text vectors' root mean square.
        samples: noise levels per step.
        seed: of the prefix's start, the noise and its levels.

    Returns:
        Arguments of the pipeline in the place of `prompt`.
    """
    transformer = pipe.transformer
    config, dtype, device = transformer.config, transformer.dtype, transformer.device
    if latents.ndim != 4 or len(latents) != 1:
        raise ValueError(f"one image is attacked at a time, as latents (1, C, h, w); got {tuple(latents.shape)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embeds, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)  # (1, T, J)
    size = float(embeds.square().mean().sqrt())
    prefix = (torch.randn(1, tokens, embeds.shape[2], generator=generator) * size).to(device).requires_grad_()
    optimizer = torch.optim.Adam([prefix], lr=lr * size)
    patch = pipe.patch_size
    layout = FrameLayout.build(
        [Frame((latents.shape[2] // patch, latents.shape[3] // patch))], tokens + embeds.shape[1]
    )
    clean = latents.to(device).expand(samples, -1, -1, -1)
    for _ in range(steps):
        # The hooks know one noise level per call, so all samples of a step share it.
        sigma = float(torch.rand((), generator=generator))
        noise = torch.randn(clean.shape, generator=generator).to(device)
        with torch.enable_grad():
            text = torch.cat([prefix, embeds], dim=1).expand(samples, -1, -1)
            velocity, *_ = transformer(
                hidden_states=pack((1 - sigma) * clean + sigma * noise, patch).to(dtype),
                encoder_hidden_states=text.to(dtype),
                pooled_projections=text.mean(1).to(dtype),
                timestep=torch.full((samples,), sigma * 1000 / config.timestep_scale, device=device),
                guidance=torch.ones(samples, device=device) if config.guidance_embeds else None,
                layout=layout,
                return_dict=False,
            )
            loss = (velocity - pack(noise - clean, patch)).float().square().mean()
            (prefix.grad,) = torch.autograd.grad(loss, [prefix])
        optimizer.step()
    return {"prompt_embeds": torch.cat([prefix.detach(), embeds], dim=1).to(embeds.dtype)}
