"""Attention over packed batches: sequences of unequal lengths in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from imgdit import compat
from imgdit.layout import RowGroup


class PackedRows:
    """The groups of a packed batch as one variable-length attention call.

    The bias' lengths are Python numbers, so it is built once per run and not in every layer.
    """

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor, back: torch.Tensor, bias: Any) -> None:
        self.queries = queries
        """Rows of the sequence in the order of the groups."""
        self.keys = keys
        """Rows of [sequence, cache] in the order in which the groups see them."""
        self.back = back
        """Place of each row of the sequence among `queries`."""
        self.bias = bias
        """`xformers.ops.fmha.BlockDiagonalMask` over the groups."""

    @classmethod
    def build(cls, groups: Sequence[RowGroup], length: int, device: torch.device | str) -> PackedRows:
        """The groups over a sequence of `length` rows. Needs xformers (its bias is plain torch and works on a CPU)."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        queries = [torch.cat([torch.arange(r.start, r.stop) for r in group.queries]) for group in groups]
        keys = [
            torch.cat(
                [torch.arange(r.start, r.stop) for r in group.keys]
                + [torch.arange(length + r.start, length + r.stop) for r in group.cached]
            )
            for group in groups
        ]
        bias = BlockDiagonalMask.from_seqlens(
            q_seqlen=[len(q) for q in queries], kv_seqlen=[len(k) for k in keys], device=torch.device(device)
        )
        order = torch.cat(queries)
        return cls(order.to(device), torch.cat(keys).to(device), torch.argsort(order).to(device), bias)


def packed_backend(query: torch.Tensor, backend: Any) -> bool:
    """Whether a packed batch goes through xformers: on CUDA, if it is installed and no other backend is asked for."""
    return (
        query.is_cuda
        and query.shape[0] == 1
        and query.shape[-1] % 8 == 0
        and compat.attention_backend_name(backend) in ("native", "xformers")
        and compat.is_xformers_available()
    )


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRows,
    *,
    cached: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """All groups in one call of `kernel(query, key, value, attn_bias=…)`, xformers' by default. (1, S, H, D) each."""
    if kernel is None:
        from xformers.ops import memory_efficient_attention

        kernel = memory_efficient_attention
    if cached is not None:
        key, value = torch.cat([key, cached[0]], dim=1), torch.cat([value, cached[1]], dim=1)
    out = kernel(query[:, packed.queries], key[:, packed.keys], value[:, packed.keys], attn_bias=packed.bias)
    return out[:, packed.back]
