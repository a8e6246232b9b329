"""Attention over packed batches: sequences of unequal lengths in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch

from imgdit import compat
from imgdit.layout import RowGroup

WIDEST_HEAD = 256
"""Most features of a head that flash attention's kernels take."""
FIRST_CAPABILITY = 8
"""CUDA compute capability from which they run: Ampere."""


class PackedRows:
    """The groups of a packed batch as one variable-length attention call.

    The kernels want the lengths as Python numbers, so this is built once per run and not in every layer.
    """

    def __init__(self, queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], device: torch.device) -> None:
        """
        Args:
            queries: rows of the sequence, group by group.
            keys: rows of [sequence, cache] that each group sees.
            device: of the attention.
        """
        self.query_lengths = [len(rows) for rows in queries]
        """Rows of each group."""
        self.key_lengths = [len(rows) for rows in keys]
        """Rows that each group sees."""
        order = torch.cat(list(queries))
        self.queries = order.to(device)
        """Rows of the sequence in the order of the groups."""
        self.keys = torch.cat(list(keys)).to(device)
        """Rows of [sequence, cache] in the order in which the groups see them."""
        self.back = torch.argsort(order).to(device)
        """Place of each row of the sequence among `queries`."""
        self.query_starts = _starts(self.query_lengths, device)
        """Where each group's queries begin, and where the last one's end (groups + 1,), int32."""
        self.key_starts = _starts(self.key_lengths, device)
        """The same of its keys."""

    @classmethod
    def build(cls, groups: Sequence[RowGroup], length: int, device: torch.device | str) -> PackedRows:
        """The groups over a sequence of `length` rows."""
        queries = [torch.cat([torch.arange(r.start, r.stop) for r in group.queries]) for group in groups]
        keys = [
            torch.cat(
                [torch.arange(r.start, r.stop) for r in group.keys]
                + [torch.arange(length + r.start, length + r.stop) for r in group.cached]
            )
            for group in groups
        ]
        return cls(queries, keys, torch.device(device))

    @functools.cached_property
    def bias(self) -> Any:
        """`xformers.ops.fmha.BlockDiagonalMask` over the groups; needs xformers."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(
            q_seqlen=self.query_lengths, kv_seqlen=self.key_lengths, device=self.queries.device
        )


def packed_backend(query: torch.Tensor, backend: Any) -> Literal["varlen", "xformers"] | None:
    """By which kernel a packed batch is one call; `None`: one call of the dispatcher per group.

    On CUDA, PyTorch's variable-length attention computes in half precision what is left to PyTorch, and xformers what
    `set_attention_backend("xformers")` asks for. Other backends of diffusers take no lengths.

    Args:
        query: (B, S, H, D).
        backend: diffusers' name of an attention backend; `None`: the active one.
    """
    if not query.is_cuda or query.shape[0] != 1 or query.shape[-1] % 8:
        return None
    name = compat.attention_backend_name(backend)
    if name == "xformers":
        return "xformers"
    return "varlen" if name == "native" and _varlen_takes(query) else None


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRows,
    *,
    cached: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: Literal["varlen", "xformers"] = "varlen",
) -> torch.Tensor:
    """All groups in one call.

    Args:
        query, key, value: (1, S, H, D).
        packed: the groups.
        cached: keys and values (1, K, H, D) of rows that are not in the sequence.
        kernel: "varlen" is `torch.nn.attention.varlen` (PyTorch 2.10 and later, half precision), "xformers" its
            `memory_efficient_attention`.

    Returns:
        (1, S, H, D).
    """
    if cached is not None:
        key, value = torch.cat([key, cached[0]], dim=1), torch.cat([value, cached[1]], dim=1)
    query, key, value = query[:, packed.queries], key[:, packed.keys], value[:, packed.keys]
    out = (_xformers if kernel == "xformers" else _varlen)(query, key, value, packed)
    return out[:, packed.back]


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # PyTorch's own attention has a rule of autocast, this operator has none.
    dtype = _compute_dtype(query)
    q, k, v = (x[0].to(dtype) for x in (query, key, value))
    starts, longest = (packed.query_starts, packed.key_starts), (max(packed.query_lengths), max(packed.key_lengths))
    out: Any = varlen_attn(q, k, v, *starts, *longest)  # a pair if the log-sum-exp is asked for
    return out[None]


def _xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value, attn_bias=packed.bias)


def _varlen_takes(query: torch.Tensor) -> bool:
    return (
        query.shape[-1] <= WIDEST_HEAD
        and _compute_dtype(query) in (torch.bfloat16, torch.float16)
        and compat.has_varlen_attention()
        and torch.cuda.get_device_capability(query.device)[0] >= FIRST_CAPABILITY
    )


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
