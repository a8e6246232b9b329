"""What a training step computes on, and what an objective returns.

B batch, F frames, N tokens of the frames, C channels, T text tokens, J text features, P pooled features, H x W pixels.
sigma is the noise level in [0, 1].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from imgdit.frames import Frame
from imgdit.layout import FrameLayout


class Movable:
    """Moves its tensors together."""

    def to(self, device: Any, **options: Any) -> Any:
        """The same on another device."""
        return self._map(lambda value: value.to(device, **options))

    def pin_memory(self) -> Any:
        """The same in page-locked memory, from where a GPU reads faster."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, change: Any) -> Any:
        moved = {}
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                moved[f.name] = change(value)
            elif isinstance(value, Movable):
                moved[f.name] = value._map(change)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Text(Movable):
    """Encoded text."""

    embeddings: torch.Tensor
    """(B, T, J)."""
    pooled: torch.Tensor
    """(B, P)."""
    mask: torch.Tensor | None = None
    """Boolean (B, T), true on real tokens; `None`: all are."""

    def rows(self, rows: slice) -> Text:
        """Some of the samples' text."""
        return self._map(lambda value: value[rows])


@dataclass(frozen=True, eq=False)
class Batch(Movable):
    """Frames with their text. All samples share one layout."""

    tokens: torch.Tensor
    """(B, N, C) clean tokens of all frames, in the layout's order."""
    layout: FrameLayout
    """The frames. One with a noise level of its own (`Frame.sigma`) conditions: it is never predicted."""
    text: Text
    """The samples' text."""
    empty: Text | None = None
    """The empty text, with B = 1: what a dropped text becomes."""
    empty_tokens: torch.Tensor | None = None
    """(N, C): what the tokens of a dropped condition become (a black image's latents in OminiControl); `None`:
    zeros. Only rows of clean frames are read."""
    counts: torch.Tensor | None = None
    """Boolean (B, F): frames whose prediction is part of the loss; `None`: all that are generated. A sample without
    any contributes 0."""
    sigmas: torch.Tensor | None = None
    """(B, F) noise levels to use instead of drawing them."""
    noise: torch.Tensor | None = None
    """(B, N, C) noise to use instead of drawing it."""

    def at(self, sigma: float) -> Batch:
        """The batch with every generated frame at one noise level and the clean frames at theirs."""
        levels = [sigma if frame.sigma is None else frame.sigma for frame in live_frames(self.layout)]
        return dataclasses.replace(self, sigmas=self.tokens.new_tensor(levels).expand(len(self.tokens), -1))


@dataclass(frozen=True, eq=False)
class Images(Movable):
    """Images for an autoencoder."""

    pixels: torch.Tensor
    """(B, 3, H, W) in [-1, 1]."""
    weight: torch.Tensor | None = field(default=None)
    """(B, 1, H, W) weight of each pixel in the reconstruction, 1 on average; `None`: 1."""


class ObjectiveOutput(NamedTuple):
    """What a step learns from and what it writes down."""

    loss: torch.Tensor
    """Scalar with gradient: the mean over samples of each sample's own mean, so that batches add up."""
    metrics: dict[str, torch.Tensor]
    """Detached scalars."""


def live_frames(layout: FrameLayout) -> list[Frame]:
    return [layout.frames[i] for i in layout.live]
