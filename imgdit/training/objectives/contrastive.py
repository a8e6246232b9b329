"""Contrastive training of text embeddings (DiffEmbed, arXiv 2505.15045, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch

from imgdit.models.text_embeddings import Pooling, contrastive_loss, cosines, pool
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.text_pairs import TextPairs, text_features


def contrastive(
    model: torch.nn.Module,
    scheduler: Any,
    batch: TextPairs,
    generator: torch.Generator | None,
    *,
    scale: float = 20.0,
    pooling: Pooling = "mean",
) -> ObjectiveOutput:
    """The cross entropy with which each query finds its positive among the positives and hard negatives of its batch.

    Larger batches make a harder task: the loss depends on how many pairs a micro-batch has.

    Args:
        model: an encoder or a language model of transformers, wrapped for distributed training or not.
        scheduler, generator: not used.
        batch: pairs.
        scale: of the cosines.
        pooling: see `pool`.
    """
    vectors = pool(text_features(model, batch), batch.mask, pooling).float()
    queries, positives, negatives = vectors.tensor_split([batch.pairs, 2 * batch.pairs])
    loss = contrastive_loss(queries, positives, negatives if len(negatives) else None, scale=scale)
    found = cosines(queries.detach(), torch.cat([positives, negatives]).detach()).argmax(1)
    right = found == torch.arange(batch.pairs, device=found.device)
    return ObjectiveOutput(loss, {"right": right.float().mean()})
