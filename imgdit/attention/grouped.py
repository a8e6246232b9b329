"""Attention over groups of rows, and the key/value cache of frozen frames.

Rows that see the same set form a group; a group is one attention call on the concatenation of what it sees, so no
path builds a dense mask. On CUDA all groups of a packed batch are one call of PyTorch's variable-length attention, or
of xformers' if that backend is set; everything else goes through diffusers' attention dispatcher and its backends.

B batch, S rows of the joint sequence, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from imgdit import compat
from imgdit.attention.packed import PackedRows, packed_attention, packed_backend
from imgdit.layout import RowGroup

# Backends that take a boolean (B, 1, 1, keys) mask, and those that want it additive and spelled out for every query.
# The rest (flash, sage, ...) take no mask, or only one whose padding comes last: padded samples are attended one by
# one.
_BOOLEAN_MASK = {"native", "_native_math", "_native_efficient", "_native_cudnn"}
_ADDITIVE_MASK = {"flex", "xformers"}


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Sequence[RowGroup] | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    cached: tuple[torch.Tensor, torch.Tensor] | None = None,
    packed: PackedRows | None = None,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Attention in which each group of rows sees only its keys.

    Args:
        query, key, value: (B, S, H, D); there may be fewer queries, of the first rows.
        groups: who sees whom; together their queries are all rows of `query`. `None`: everything sees everything.
        key_mask: boolean (B, S), False on padding: keys that nobody sees. Or floating: to each logit the product of
            the numbers of its row and its key is added, as models do that give the attention such a mask (Chroma).
        cached: keys and values (B, K, H, D) of rows that are not in the sequence.
        packed: the same groups for one variable-length call (`PackedRows.build`), used on CUDA.
        backend: name of a diffusers attention backend; `None`: the active one.
        parallel_config: diffusers' context-parallel configuration.

    Returns:
        (B, S, H, D).

    Raises:
        ValueError: the backend computes on another device; it is a sage kernel, which takes no bias; or padded samples
            would be attended one by one in a compiled graph.
    """
    if not query.shape[1]:
        return query
    width, scale = query.shape[-1], None
    if key_mask is not None and key_mask.is_floating_point():
        _check_takes_bias(backend, "this model adds its text mask to the logits")
        query, key, value, cached = _with_products(query, key, value, cached, key_mask)
        key_mask, packed, scale = None, None, width**-0.5
    if groups is None or _is_everything(groups, key.shape[1]):
        return _attend(query, key, value, key_mask, backend, parallel_config, scale)[..., :width]
    biased = any(group.bias is not None for group in groups)
    if packed is not None and key_mask is None and not biased and (kernel := packed_backend(query, backend)):
        return packed_attention(query, key, value, packed, cached=cached, kernel=kernel)
    pieces: list[tuple[int, torch.Tensor]] = []  # with their places among all
    for group in groups:
        keys, values = _rows(key, group.keys), _rows(value, group.keys)
        masks = None if key_mask is None else _rows(key_mask, group.keys)
        if group.cached:
            assert cached is not None, "a layout without its frozen frames needs the cache that holds them"
            keys.extend(_rows(cached[0], group.cached))
            values.extend(_rows(cached[1], group.cached))
            if masks is not None:
                masks.append(masks[0].new_ones(masks[0].shape[0], sum(s.stop - s.start for s in group.cached)))
        asked, scale_of_group = _cat(_rows(query, group.queries)), scale
        if group.bias is not None:
            _check_takes_bias(backend, "the strength of a condition is one")
            scale_of_group = width**-0.5
            asked, keys, values = _with_bias(asked, keys, values, group.bias, scale_of_group)
        mask = None if masks is None else _cat(masks)
        out = _attend(asked, _cat(keys), _cat(values), mask, backend, parallel_config, scale_of_group)[..., :width]
        lengths = [rows.stop - rows.start for rows in group.queries]
        ranks = group.ranks or [rows.start for rows in group.queries]
        pieces += zip(ranks, out.split(lengths, dim=1), strict=True)
    return _cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])])


def _check_takes_bias(backend: Any, why: str) -> None:
    name = compat.attention_backend_name(backend)
    if name.lstrip("_").startswith("sage"):
        raise ValueError(
            f"attention backend {name!r} computes logits in 8 bits and takes no bias, but {why}; call "
            "set_attention_backend('native') or choose a flash kernel"
        )


def _with_bias(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """One more feature, 1 / scale in the query and the bias in the key: their scaled product is the bias.

    So a bias that is constant over a slice of keys needs no mask, which flash and sage kernels refuse. Kernels want
    features in multiples of 8 and as many of the values; the others are zero.
    """
    width = query.shape[-1]
    query = F.pad(query, (0, 8))
    query[..., width].fill_(1 / scale)
    keys = [F.pad(key, (0, 8)) for key in keys]
    for key, value in zip(keys, bias.unbind(), strict=True):
        key[..., width].copy_(value)
    return query, keys, [F.pad(value, (0, 8)) for value in values]


def _with_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor] | None,
    numbers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """One more feature, as in `_with_bias`: the numbers (B, S) of the rows in queries and keys; 1 for those cached."""
    width = query.shape[-1]
    query, key, value = (F.pad(x, (0, 8)) for x in (query, key, value))
    query[..., width] = (numbers[:, : query.shape[1]] * width**0.5)[:, :, None]
    key[..., width] = numbers[:, :, None]
    if cached is not None:
        cached = F.pad(cached[0], (0, 8)), F.pad(cached[1], (0, 8))
        cached[0][..., width] = 1.0
    return query, key, value, cached


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    backend: Any,
    parallel_config: Any,
    scale: float | None = None,
) -> torch.Tensor:
    """One dispatched attention call; the key mask in the form the backend computes rightly."""
    if query.requires_grad and query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16):
        # PyTorch's half-precision kernel for CPUs takes three times as long backwards as its float32 one.
        with torch.autocast("cpu", enabled=False):
            query_, key_, value_ = (x.float() for x in (query, key, value))
            return _attend(query_, key_, value_, key_mask, backend, parallel_config, scale).to(query.dtype)
    name = compat.attention_backend_name(backend)
    if name == "xformers" and not query.is_cuda:
        raise ValueError(
            f"attention backend 'xformers' has kernels for CUDA only, got tensors on {query.device}; "
            "move the model to a CUDA device or call set_attention_backend('native')"
        )
    if key_mask is None or name in _BOOLEAN_MASK:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return compat.dispatch_attention(query, key, value, mask, backend, parallel_config, scale)
    if name in _ADDITIVE_MASK:
        # The kernels want rows that start at multiples of 8: allocate a little more and expand over heads and queries.
        batch, keys = key_mask.shape
        bias = query.new_zeros(batch, 1, 1, -(-keys // 8) * 8)[..., :keys]
        bias = bias.masked_fill_(~key_mask[:, None, None, :], float("-inf"))
        bias = bias.expand(batch, query.shape[2], query.shape[1], keys)
        return compat.dispatch_attention(query, key, value, bias, backend, parallel_config, scale)
    if torch.compiler.is_compiling():
        raise ValueError(
            f"attention backend {name!r} takes no mask, so padded prompts are attended one by one, which no compiled "
            "graph can hold; call set_attention_backend('native'), or pass prompts of one length"
        )
    return torch.cat(
        [
            compat.dispatch_attention(q[None], k[None, m], v[None, m], None, backend, parallel_config, scale)
            for q, k, v, m in zip(query, key, value, key_mask, strict=True)
        ]
    )


def _is_everything(groups: Sequence[RowGroup], length: int) -> bool:
    return len(groups) == 1 and not groups[0].cached and groups[0].keys == (slice(0, length),)


def _rows(x: torch.Tensor, slices: Sequence[slice]) -> list[torch.Tensor]:
    return [x[:, rows] for rows in slices]


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)
