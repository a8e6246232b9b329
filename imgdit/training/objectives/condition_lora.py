"""Condition tokens read by their own LoRA (OminiControl, arXiv 2411.15098)."""

from __future__ import annotations

import dataclasses

import torch

from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.objectives.frames import check_batch, chosen_rows, training_fractions


def condition_lora(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    distribution: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    text_dropout: float = 0.1,
    condition_dropout: float = 0.1,
    guidance: float = 1.0,
) -> ObjectiveOutput:
    """Condition tokens read by their own LoRA (OminiControl, arXiv 2411.15098): the target has noise, the conditions
    are clean, and only the target is learned.

    The layout says which frame is read by which adapter (`Frame(..., sigma=0.0, adapter="canny")`).

    Args:
        model, scheduler, batch, generator, distribution, mean, std, guidance: see `flow_matching`.
        text_dropout: fraction of samples whose text becomes the empty one.
        condition_dropout: fraction of samples whose conditions become `batch.empty_tokens`; still held clean.

    Raises:
        ValueError: no condition with an adapter in the layout, or as `flow_matching`.
    """
    layout = batch.layout
    check_batch(batch)
    if not any(not frame.predicted and frame.adapter is not None for frame in layout.frames):
        raise ValueError(
            "condition_lora needs a layout with a clean frame that an adapter reads, "
            f'such as Frame(size, sigma=0.0, adapter="canny"); got {[(f.sigma, f.adapter) for f in layout.frames]}'
        )
    (dropout,) = training_fractions(model, condition_dropout=condition_dropout)
    if dropout:
        device = batch.tokens.device
        dropped = chosen_rows(len(batch.tokens), dropout, generator, device)
        conditions = torch.ones(layout.image_length, dtype=torch.bool, device=device)
        for rows in layout.predicted:
            conditions[rows] = False
        empty = batch.tokens.new_zeros(1) if batch.empty_tokens is None else batch.empty_tokens
        tokens = torch.where((dropped[:, None] & conditions)[..., None], empty, batch.tokens)
        batch = dataclasses.replace(batch, tokens=tokens)
    return flow_matching(
        model,
        scheduler,
        batch,
        generator,
        distribution=distribution,
        mean=mean,
        std=std,
        shared=True,
        text_dropout=text_dropout,
        guidance=guidance,
    )
