"""Texts as vectors by a masked language model: one per token, pooled into one per text, and their contrastive loss.

DiffEmbed, arXiv 2505.15045. B texts, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch.nn import functional

from imgdit.models.masked_lm import real_positions
from imgdit.naming import check_choice

Pooling = Literal["mean", "weighted_mean", "last_token"]


def encode(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, *, layer: int = -1, float_mask: bool = False
) -> torch.Tensor:
    """Features (B, L, D) of each token; padding changes nothing. Gradients flow, unless turned off outside.

    Args:
        model: a bidirectional language model of transformers.
        ids: (B, L).
        mask: (B, L), 1 on real tokens, padded on any side; `None`: all are real.
        layer: of `hidden_states`: 0 the token embeddings, -1 the last one, after the final norm.
        float_mask: add the mask to the attention scores, as DiffEmbed's published code does: padding is then seen
            with e^-1 of the weight of a real token, so that a text's features depend on those it is batched with.
    """
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask must be {tuple(ids.shape)} like the tokens, got {tuple(mask.shape)}")
    options: dict[str, Any] = {}
    if mask is not None and float_mask:
        options["attention_mask"] = mask.to(model.dtype)[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    elif mask is not None:
        options |= {"attention_mask": mask.long(), "position_ids": real_positions(mask)}
    # The backbone without its head, whose logits are not needed.
    output = model.base_model(input_ids=ids, output_hidden_states=layer != -1, use_cache=False, **options)
    return output.last_hidden_state if layer == -1 else output.hidden_states[layer]


def pool(features: torch.Tensor, mask: torch.Tensor | None = None, pooling: Pooling = "mean") -> torch.Tensor:
    """One vector (B, D) per text from the features (B, L, D) of its tokens.

    Args:
        mask: (B, L), 1 on the tokens that count: the real ones, or those behind an instruction. `None`: all.
        pooling: "mean"; "weighted_mean", by 1, 2, 3, … from a text's first token; "last_token".

    Raises:
        ValueError: a text without a token that counts.
    """
    check_choice("pooling", pooling, get_args(Pooling))
    counted = torch.ones(features.shape[:2], device=features.device) if mask is None else mask.to(features.device)
    if counted.shape != features.shape[:2]:
        raise ValueError(f"mask must be {tuple(features.shape[:2])} like the features, got {tuple(counted.shape)}")
    counted = counted.bool()
    empty = (~counted.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"texts {empty} have no token that counts; leave empty texts out")
    rank = counted.long().cumsum(1) * counted  # 1, 2, 3, … on the tokens that count
    if pooling == "last_token":
        return features[torch.arange(len(features), device=features.device), rank.argmax(1)]
    weights = (rank if pooling == "weighted_mean" else counted).to(features.dtype)
    weights = weights / weights.sum(1, keepdim=True)
    # Padding may hold anything, nan included, which a product with 0 would keep.
    return (features.masked_fill(~counted[..., None], 0) * weights[..., None]).sum(1)


@torch.no_grad()
def embed_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], *, pooling: Pooling = "mean", batch_size: int = 32
) -> torch.Tensor:
    """Vectors (N, D) float32 of length 1, on the CPU, of texts as they are, without a chat template.

    Raises:
        ValueError: no text, one without a token, or one longer than the model's positions.
    """
    if not texts:
        raise ValueError("give at least one text")
    rows = [tokenizer(text)["input_ids"] for text in texts]
    positions = getattr(model.config, "max_position_embeddings", None)
    long = [n for n, row in enumerate(rows) if positions is not None and len(row) > positions]
    if long:
        raise ValueError(
            f"text {long[0]} has {len(rows[long[0]])} tokens, the model {positions} positions; shorten it"
        )
    found = []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        longest = max(map(len, some))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in some], dtype=torch.long)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some], dtype=torch.long)
        mask = mask.to(model.device)
        found.append(pool(encode(model, ids.to(model.device), mask).float(), mask, pooling).cpu())
    return functional.normalize(torch.cat(found), dim=-1)


def contrastive_loss(
    queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor | None = None, *, scale: float = 20.0
) -> torch.Tensor:
    """Cross entropy with which each query finds its positive among all positives and negatives, by cosine.

    Args:
        queries, positives: (B, D), pairs.
        negatives: (N, D), hard ones, which belong to no query in particular.
        scale: of the cosines.
    """
    if queries.shape != positives.shape:
        raise ValueError(f"each query needs a positive: got {tuple(queries.shape)} and {tuple(positives.shape)}")
    others = positives if negatives is None else torch.cat([positives, negatives])
    scores = scale * cosines(queries, others)  # (B, B + N)
    return functional.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def cosines(queries: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Cosine (B, N) of each vector (B, D) with each other vector (N, D)."""
    return functional.normalize(queries, dim=-1) @ functional.normalize(others, dim=-1).T
