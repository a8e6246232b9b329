"""Features of a block aligned with those of the autoencoder (SRA 2, arXiv 2601.17830)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from imgdit.layout import take_rows
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.objectives.alignment import (
    aligned,
    head_of,
    noisy_frames,
    pass_with_features,
    target_rows,
    with_head,
)


@with_head(lambda model: model.token_channels)
def feature_alignment(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    weight: float = 0.5,
    depth: float = 0.5,
    distribution: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    clean: float = 0.0,
    text_dropout: float = 0.1,
    condition_dropout: float = 0.0,
) -> ObjectiveOutput:
    """Flow matching, and the features h of a block are projected onto the autoencoder's features z of the clean image
    (SRA 2, arXiv 2601.17830: velocity loss + weight * d(head(h), z)). z are the latents themselves, of every token of
    a frame with noise; no other network is run. The distance d is our choice, smooth L1.

    While the model does not train, the loss is that of `flow_matching` alone.

    Args:
        model: built by the recipe, with its head.
        scheduler, batch, generator, distribution, mean, std, clean, text_dropout, condition_dropout: see
            `flow_matching`.
        weight: of the alignment.
        depth: of the block, as a fraction of the blocks.

    Raises:
        ValueError: as `flow_matching`, or a model without the head.
    """
    output, seen, features = pass_with_features(
        model, scheduler, batch, generator, depth, distribution=distribution, mean=mean, std=std, clean=clean,
        text_dropout=text_dropout, condition_dropout=condition_dropout,
    )  # fmt: skip
    if not model.training:
        return output
    layout = batch.layout
    projected = head_of(model)(target_rows(features, layout))
    latents = take_rows(batch.tokens, layout.predicted)
    errors = F.smooth_l1_loss(projected.float(), latents.float(), reduction="none").mean(-1)  # (B, n)
    return aligned(output, errors, layout, noisy_frames(seen), weight)
