"""Block diffusion of text (BD3-LM, arXiv 2503.09573)."""

from __future__ import annotations

from typing import Any

import torch

from imgdit.schedulers.text_noise import TextNoise
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.block_diffusion_loss import block_diffusion_loss
from imgdit.training.text_rows import TextRows


def block_text(
    model: torch.nn.Module,
    scheduler: Any,
    batch: TextRows,
    generator: torch.Generator | None,
    *,
    noise: TextNoise = "loglinear",
    low: float | None = None,
    high: float | None = None,
    resample: bool = True,
    fixed_counts: bool = False,
) -> ObjectiveOutput:
    """Block diffusion of text, or what else a `BD3LM` learns: MDLM, SEDD, the next token. Prompts are never masked.

    Args:
        model: `BD3LM`, wrapped for distributed training or not.
        scheduler: not used.
        batch: rows that begin with the token that begins every text.
        generator: source of times and masks.
        noise, low, high, resample, fixed_counts: see `block_diffusion_loss`; bounds hold while training only.
    """
    if not model.training:
        low = high = None
        resample = False
    output = block_diffusion_loss(
        model, batch.ids, batch.counted, noise=noise, low=low, high=high, resample=resample,
        fixed_counts=fixed_counts, prompt_mask=batch.prompt, generator=generator,
    )  # fmt: skip
    return ObjectiveOutput(output.loss, {"masked": output.nlls.ne(0).float().mean()})
