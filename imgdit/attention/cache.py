"""Keys and values of frozen rows, computed once and read in later steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from imgdit.attention.grouped import _cat, _rows
from imgdit.layout import FrameLayout


class KVCache:
    """Keys and values of frozen frames, one store per layer.

    A run writes it once, with all frames in the sequence, and after `freeze()` reads it, with
    `FrameLayout.without_frozen()`. It lives outside the model and belongs to one combination of frozen content,
    pooled text, adapter weights and dtype: whoever keeps it must key it by these.
    """

    def __init__(self) -> None:
        self._mode: Literal["write", "read"] = "write"
        self.rotation: tuple[float, float] | None = None
        """Divisor of the positions and base of the rotations, for a model that changes them during a run."""
        self._layers: dict[str, LayerCache] = {}

    @property
    def mode(self) -> Literal["write", "read"]:
        """What the next pass does."""
        return self._mode

    @mode.setter
    def mode(self, mode: Literal["write", "read"]) -> None:
        """As of version 0.1; it goes with version 0.3."""
        warnings.warn("KVCache.mode is not to be set any more; call freeze()", DeprecationWarning, stacklevel=2)
        self._mode = mode

    def freeze(self) -> None:
        """End the writing: later passes read what the last one wrote."""
        self._mode = "read"

    def layer(self, name: str) -> LayerCache:
        """The store of one block, in the cache's present mode."""
        if self.mode == "write":
            self._layers[name] = LayerCache()
        elif name not in self._layers:
            raise ValueError(
                f"the key/value cache is read but holds nothing for {name}; run one step with all frames and then "
                "call freeze()"
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
            asked = batch, sum(layout.segment_length(i) for i in layout.cached)
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
        elif layout.reads_cache:
            raise ValueError(
                "the layout leaves its frozen frames to a key/value cache that is still written; run one step with "
                "all frames first and call freeze()"
            )
        if self.mode == "write":
            self.rotation = rotation

    def of_samples(self, numbers: torch.Tensor) -> KVCache:
        """A cache to read, whose sample i has what this one holds of sample `numbers[i]`: several texts about each
        image read its keys and values."""
        other = KVCache()
        other.rotation, other._mode = self.rotation, "read"
        other._layers = {name: layer.of_samples(numbers) for name, layer in self._layers.items()}
        return other

    def clear(self) -> None:
        """Forget everything; the next run writes."""
        self._layers.clear()
        self._mode = "write"


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

    def of_samples(self, numbers: torch.Tensor) -> LayerCache:
        """See `KVCache.of_samples`."""
        other = LayerCache()
        other._stored = {name: (key[numbers], value[numbers]) for name, (key, value) in self._stored.items()}
        return other

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
