"""Attention whose logits x become c * tanh(x / c), as Gemma 2 (arXiv 2408.00118, section 2) and OneDiffusion have it.

No backend of diffusers' dispatcher has the cap, so this is the plain computation, some rows at a time.

B batch, S rows, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imgdit.layout import RowGroup

LOGITS = 1 << 25
"""Most logits held at a time: 128 MiB in float32."""


def softcap_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cap: float,
    groups: Sequence[RowGroup] | None = None,
    *,
    cached: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`grouped_attention` with capped logits, which are computed in float32 whatever the dtype.

    Args:
        query, key, value: (B, S, H, D).
        cap: largest absolute logit.
        groups: who sees whom; `None`: everything sees everything.
        cached: keys and values (B, K, H, D) of rows that are not in the sequence.

    Returns:
        (B, S, H, D).
    """
    if groups is None:
        return _attend(query, key, value, cap)
    out = torch.empty_like(query)
    for group in groups:
        keys, values = [key[:, r] for r in group.keys], [value[:, r] for r in group.keys]
        if cached is not None:
            keys += [cached[0][:, r] for r in group.cached]
            values += [cached[1][:, r] for r in group.cached]
        k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        for rows in group.queries:
            out[:, rows] = _attend(query[:, rows], k, v, cap)
    return out


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cap: float) -> torch.Tensor:
    batch, rows, heads, features = query.shape
    q = query.transpose(1, 2).float() / (cap * features**0.5)  # (B, H, S, D)
    k, v = key.permute(0, 2, 3, 1).float(), value.transpose(1, 2).float()
    step = max(1, LOGITS // (batch * heads * key.shape[1]))
    parts = [(cap * torch.tanh(q[:, :, i : i + step] @ k)).softmax(dim=-1) @ v for i in range(0, rows, step)]
    return torch.cat(parts, dim=2).transpose(1, 2).to(query.dtype)
