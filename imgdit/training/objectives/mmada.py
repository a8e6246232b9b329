"""Masked diffusion of text and image codes, several tasks in a batch (MMaDA, arXiv 2505.15809)."""

from __future__ import annotations

from typing import Any

import torch

from imgdit import compat
from imgdit.models.masked_lm import masked_logits
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.masked_text_loss import Noised, mask_codes, mask_tokens, masked_text_loss
from imgdit.training.mmada import MMaDABatch


def mmada(
    model: torch.nn.Module,
    scheduler: Any,
    batch: MMaDABatch,
    generator: torch.Generator | None,
    *,
    text_to_image: float = 1.0,
    understanding: float = 1.0,
    language: float = 0.1,
    reasoning: float = 1.0,
    dropout: float = 0.1,
    mask_schedule: str = "cosine",
) -> ObjectiveOutput:
    """A weighted sum of each task's loss: the mean over masked codes of text to image, and LLaDA's fine-tuning loss of
    the others. Padding is never seen, unlike in the published code, where it is a little.

    Args:
        model: a masked language model of transformers, wrapped for distributed training or not.
        scheduler: not used.
        batch: rows.
        generator: source of rates, masks and dropped prompts.
        text_to_image, understanding, language, reasoning: weights of the tasks; the published first stage has 1, 1
            and 0.1 for the first three.
        dropout: fraction of the prompts of images that are dropped, for guidance.
        mask_schedule: of the codes, see `masked_fraction`.
    """
    weights = {
        "text_to_image": text_to_image, "understanding": understanding, "language": language, "reasoning": reasoning,
    }  # fmt: skip
    device, mask_token_id = batch.tokens.device, compat.unwrapped(model).config.mask_token_id
    source = device if generator is None else generator.device
    dropped = torch.rand(len(batch.tokens), device=source, generator=generator).to(device) < dropout
    targets = torch.where(dropped[:, None], batch.empty, batch.tokens)
    seen = torch.where(dropped[:, None], batch.empty_mask, batch.attention_mask)
    places = {
        task: torch.tensor([n for n, one in enumerate(batch.tasks) if one == task], device=device) for task in weights
    }
    ids, noised = targets.clone(), {}
    for task, rows in places.items():
        if len(rows):
            learnt = batch.learnt[rows]
            noised[task] = (
                _masked_images(targets[rows], learnt, mask_token_id, mask_schedule, generator)
                if task == "text_to_image"
                else mask_tokens(targets[rows], mask_token_id, maskable=learnt, generator=generator)
            )
            ids[rows] = noised[task].ids
    logits = masked_logits(model, ids, seen)
    total, metrics = logits.new_zeros((), dtype=torch.float32), {}
    for task, found in noised.items():
        rows = places[task]
        lengths = None if task == "text_to_image" else batch.learnt[rows].sum(1)
        loss = masked_text_loss(
            logits[rows], targets[rows], found, weight="none" if lengths is None else "rate_and_length",
            lengths=lengths,
        )  # fmt: skip
        metrics[task] = loss.detach()
        total = total + weights[task] * loss
    return ObjectiveOutput(total, metrics)


def _masked_images(
    ids: torch.Tensor, learnt: torch.Tensor, mask_token_id: int, schedule: str, generator: torch.Generator | None
) -> Noised:
    """Rows (B, L) of which the codes are masked by a schedule.

    Args:
        learnt: boolean (B, L), the codes, as many in each row.
    """
    codes = ids[learnt].view(len(ids), -1)
    noised = mask_codes(codes, mask_token_id, schedule=schedule, generator=generator)
    masked = torch.zeros_like(learnt).masked_scatter(learnt, noised.masked)
    return Noised(ids.masked_scatter(learnt, noised.ids), masked, noised.rate)
