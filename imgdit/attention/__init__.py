"""Attention without dense masks: one call per group of rows that see the same keys."""

from imgdit.attention.cache import KVCache, LayerCache
from imgdit.attention.grouped import grouped_attention
from imgdit.attention.packed import PackedRows, packed_attention, packed_backend

__all__ = ["KVCache", "LayerCache", "PackedRows", "grouped_attention", "packed_attention", "packed_backend"]
