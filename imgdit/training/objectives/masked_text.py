"""Masked diffusion of text (LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

from typing import Any

import torch

from imgdit import compat
from imgdit.models.masked_lm import masked_logits
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.masked_text_loss import Weight, mask_tokens, masked_text_loss
from imgdit.training.text_rows import TextRows


def masked_text(
    model: torch.nn.Module,
    scheduler: Any,
    batch: TextRows,
    generator: torch.Generator | None,
    *,
    weight: Weight = "rate_and_length",
    complement: bool = False,
) -> ObjectiveOutput:
    """LLaDA's fine-tuning loss, or with `weight: rate` its pre-training loss; prompts are never masked.

    Args:
        model: a masked language model of transformers, wrapped for distributed training or not.
        scheduler: not used.
        batch: rows; those without a prompt are pre-training.
        generator: source of rates and masks.
        weight: see `masked_text_loss`.
        complement: use each row twice, the second time with the other tokens masked.
    """
    mask_token_id = compat.unwrapped(model).config.mask_token_id
    noised = mask_tokens(batch.ids, mask_token_id, maskable=batch.counted, complement=complement, generator=generator)
    copies = 2 if complement else 1
    lengths = batch.counted.sum(1).repeat(copies) if weight == "rate_and_length" else None
    logits = masked_logits(model, noised.ids)
    targets = batch.ids.repeat(copies, 1)
    loss = masked_text_loss(logits, targets, noised, weight=weight, lengths=lengths)
    right = (logits.argmax(-1) == targets)[noised.masked]
    return ObjectiveOutput(loss, {"right": right.float().mean() if len(right) else loss.new_zeros(())})
