"""Attention over groups of rows, and the key/value cache of frozen frames.

Rows that see the same set form a group; a group is one attention call on the concatenation of what it sees, so no
path builds a dense mask. On CUDA all groups of a packed batch are one call of xformers' variable-length attention with
a block-diagonal bias; everything else goes through diffusers' attention dispatcher and its backends.

B batch, S rows of the joint sequence, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from . import compat
from .frames import FrameLayout, RowGroup

# Backends that take a boolean (B, 1, 1, keys) mask, and those that want it additive and spelled out for every query.
# The rest (flash, sage, ...) take no mask at all: padded samples are attended one by one.
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
        key_mask: boolean (B, S), False on padding: keys that nobody sees.
        cached: keys and values (B, K, H, D) of rows that are not in the sequence.
        packed: the same groups for one variable-length call (`PackedRows.build`), used on CUDA.
        backend: name of a diffusers attention backend; `None`: the active one.
        parallel_config: diffusers' context-parallel configuration.

    Returns:
        (B, S, H, D).
    """
    if groups is None or _is_everything(groups, key.shape[1]):
        return _attend(query, key, value, key_mask, backend, parallel_config)
    biased = any(group.bias is not None for group in groups)
    if packed is not None and key_mask is None and not biased and packed_backend(query, backend):
        return packed_attention(query, key, value, packed, cached=cached)
    pieces: list[tuple[int, torch.Tensor]] = []
    for group in groups:
        keys, values = _rows(key, group.keys), _rows(value, group.keys)
        mask = None if key_mask is None else _rows(key_mask, group.keys)
        if group.cached:
            assert cached is not None, "a layout without its frozen frames needs the cache that holds them"
            keys.extend(_rows(cached[0], group.cached))
            values.extend(_rows(cached[1], group.cached))
            if mask is not None:
                mask.append(mask[0].new_ones(mask[0].shape[0], sum(s.stop - s.start for s in group.cached)))
        asked, scale = _cat(_rows(query, group.queries)), None
        if group.bias is not None:
            scale = query.shape[-1] ** -0.5
            asked, keys, values = _with_bias(asked, keys, values, group.bias)
        out = _attend(
            asked, _cat(keys), _cat(values), None if mask is None else _cat(mask), backend, parallel_config, scale
        )[..., : query.shape[-1]]
        lengths = [rows.stop - rows.start for rows in group.queries]
        pieces += zip((rows.start for rows in group.queries), out.split(lengths, dim=1), strict=True)
    return _cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])])


def _with_bias(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], bias: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """One more feature, sqrt(D) in the query and the bias in the key: their scaled product is the bias.

    So a bias that is constant over a slice of keys needs no mask, which flash and sage kernels refuse. Kernels want
    features in multiples of 8 and as many of the values; the others are zero.
    """
    width = query.shape[-1]
    query = F.pad(query, (0, 8))
    query[..., width] = width**0.5
    keys = [F.pad(key, (0, 8)) for key in keys]
    for key, value in zip(keys, bias, strict=True):
        key[..., width] = value
    return query, keys, [F.pad(value, (0, 8)) for value in values]


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
    return torch.cat(
        [
            compat.dispatch_attention(q[None], k[None, m], v[None, m], None, backend, parallel_config, scale)
            for q, k, v, m in zip(query, key, value, key_mask, strict=True)
        ]
    )


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


class KVCache:
    """Keys and values of frozen frames, one store per layer.

    A run writes it once (`mode="write"`, all frames in the sequence) and reads it afterwards (`mode="read"`, with
    `FrameLayout.without_frozen()`). It lives outside the model and belongs to one combination of frozen content,
    pooled text, adapter weights and dtype: whoever keeps it must key it by these.
    """

    def __init__(self) -> None:
        self.mode: Literal["write", "read"] = "write"
        self.rotation: tuple[float, float] | None = None
        """Divisor of the positions and base of the rotations, for a model that changes them during a run."""
        self._layers: dict[str, LayerCache] = {}

    def layer(self, name: str) -> LayerCache:
        """The store of one block, in the cache's present mode."""
        if self.mode == "write":
            self._layers[name] = LayerCache()
        elif name not in self._layers:
            raise ValueError(
                f"the key/value cache is read but holds nothing for {name}; run one step with mode='write' first"
            )
        layer = self._layers[name]
        layer.mode = self.mode
        return layer

    def begin(self, layout: FrameLayout, batch: int, rotation: tuple[float, float] | None = None) -> None:
        """Begin a forward pass.

        Args:
            layout: of the pass.
            batch: of its samples.
            rotation: what it turns positions by; see the attribute.

        Raises:
            ValueError: it reads keys and values that are of another layout, batch or rotation.
        """
        if self.mode == "read" and layout.cached:
            stored = next((layer.size() for layer in self._layers.values()), None)
            asked = batch, sum(frame.length for i, frame in enumerate(layout.frames) if i not in layout.live)
            if stored is not None and stored != asked:
                raise ValueError(
                    f"the key/value cache holds {stored[1]} tokens of batch {stored[0]}, this call reads {asked[1]} "
                    f"of batch {asked[0]}; call clear() and run one step with all frames, or keep a cache per batch"
                )
            if self.rotation != rotation:
                raise ValueError(
                    f"the key/value cache holds keys of divisor and base {self.rotation}, this call turns its queries "
                    f"by {rotation}: the noise level crossed scale_watershed. Call clear() and run one step with all "
                    "frames"
                )
        elif layout.cached:
            raise ValueError(
                "the layout leaves its frozen frames to a key/value cache, whose mode is 'write'; run one step with "
                "all frames first and set mode='read'"
            )
        if self.mode == "write":
            self.rotation = rotation

    def clear(self) -> None:
        """Forget everything; the next run writes."""
        self._layers.clear()
        self.mode = "write"


class LayerCache:
    """Keys (after position rotation) and values (B, K, H, D) of one block's attentions."""

    def __init__(self) -> None:
        self.mode: Literal["write", "read"] = "write"
        self._stored: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def size(self) -> tuple[int, int] | None:
        """Batch and tokens of what is kept."""
        for key, _ in self._stored.values():
            return key.shape[0], key.shape[1]
        return None

    def exchange(
        self, attention: str, key: torch.Tensor, value: torch.Tensor, frozen: Sequence[slice]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Write the frozen rows and return `None`, or return what was written.

        Args:
            attention: name of the attention in its block ("attn", "attn2").
            key, value: (B, S, H, D) of the sequence.
            frozen: the frozen frames' rows in it.
        """
        if self.mode == "write":
            if frozen:
                self._stored[attention] = (_cat(_rows(key, frozen)).clone(), _cat(_rows(value, frozen)).clone())
            return None
        return self._stored.get(attention)


def _is_everything(groups: Sequence[RowGroup], length: int) -> bool:
    return len(groups) == 1 and not groups[0].cached and groups[0].keys == (slice(0, length),)


def _rows(x: torch.Tensor, slices: Sequence[slice]) -> list[torch.Tensor]:
    return [x[:, rows] for rows in slices]


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)
