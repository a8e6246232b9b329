"""Images of a batch from noise while a model trains: its conditions as they are, the first frame generated anew.

B batch, N tokens of the frames, n of the first, C channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.utils.torch_utils import randn_tensor

from imgdit.training.batches import Batch, live_frames
from imgdit.training.objectives.frames import predict_velocity


@torch.no_grad()
def sample_first_frame(
    model: torch.nn.Module,
    batch: Batch,
    *,
    steps: int,
    generator: torch.Generator,
    shift: float = 1.0,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Tokens (B, n, C) of the first frame by Euler steps from noise. The other frames are clean, the text is the
    batch's, and there is no classifier-free guidance: what is seen is what was trained.

    Args:
        model: of the run, wrapped or not.
        batch: clean tokens with their text.
        steps: of the sampler.
        generator: of the noise.
        shift: of the noise levels: σ becomes shift·σ / (1 + (shift − 1)·σ).
        guidance: input of guidance-distilled models.
    """
    first = batch.layout.lengths[0]
    tokens = batch.tokens.clone()
    tokens[:, :first] = randn_tensor(
        tokens[:, :first].shape, generator=generator, device=tokens.device, dtype=tokens.dtype
    )
    line = torch.linspace(1.0, 0.0, steps + 1)
    levels = (shift * line / (1.0 + (shift - 1.0) * line)).tolist()
    sigmas = tokens.new_zeros(len(tokens), len(live_frames(batch.layout)))
    for level, following in pairwise(levels):
        sigmas[:, 0] = level
        velocity = predict_velocity(model, tokens, batch.text, sigmas, batch.layout, guidance)[:, :first]
        tokens[:, :first] += (following - level) * velocity.to(tokens)
    return tokens[:, :first]
