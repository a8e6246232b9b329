"""Frames, and the layout by which a backbone reads them.

A generation is a sequence of frames: the image being made, a depth map that is given, a condition that steers.
`Frame` says what one of them is; `FrameLayout` puts them in a row behind the text and answers what the backbone asks:
how long each is, where each token sits, at which noise level it is held, which adapter reads it, and who sees whom.

T text tokens, N image tokens, S texts (one per scene), F frames. A *segment* is a text or a frame; segments are
numbered texts first, then frames, and the joint sequence holds their tokens in that order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from imgdit.moved import renamed


@dataclass(frozen=True, eq=False)
class Frame:
    """One latent grid: its tokens' places, its noise level, and the adapter that reads it."""

    size: tuple[int, int]
    """Rows and columns of the token grid."""
    sigma: float | None = None
    """Noise level in [0, 1] the frame is held at; `None`: the frame is being made and follows the schedule."""
    adapter: str | None = None
    """Name of the LoRA adapter that acts on this frame's tokens, and on no others."""
    sees: Literal["all", "joint", "self"] = "all"
    """What its tokens attend to: everything; everything but other frames that have an adapter (OminiControl's joint
    mode); only themselves (its independent mode, which makes keys and values cacheable)."""
    index: float = 0.0
    """First position coordinate: the frame's number (OneDiffusion), 0 where frames share a plane (OminiControl)."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Rows and columns added to the grid's coordinates, in tokens."""
    scale: float = 1.0
    """Size of a token of this frame in tokens of the target: 2 for a condition at half the side (OminiControl2)."""
    guidance: float | None = None
    """Guidance the embedding of a guidance-distilled model is given for this frame; `None`: the run's."""
    mask: torch.Tensor | None = None
    """Boolean (rows, columns): the tokens that are present. `None`: all of them."""
    strength: float = 1.0
    """γ > 0: log γ is added to the attention logits between this frame and everything else (OminiControl, section
    3.2). 1 is no bias; a frame of strength 0 is left out."""

    def __post_init__(self) -> None:
        rows, columns = self.size
        if rows < 1 or columns < 1:
            raise ValueError(f"a frame needs at least one row and one column of tokens, got size={self.size}")
        if self.sigma is not None and not 0.0 <= self.sigma <= 1.0:
            raise ValueError(f"a frame's sigma is a noise level in [0, 1] or None, got {self.sigma}")
        if self.sees not in ("all", "joint", "self"):
            raise ValueError(f"a frame sees 'all', 'joint' or 'self', got {self.sees!r}")
        if self.scale <= 0:
            raise ValueError(f"a frame's scale must be positive, got {self.scale}")
        if not 0.0 < self.strength < math.inf:
            raise ValueError(f"a frame's strength must be positive, got {self.strength}; leave the frame out for 0")
        if self.mask is not None:
            if self.mask.dtype != torch.bool or tuple(self.mask.shape) != tuple(self.size):
                raise ValueError(
                    f"a frame's mask must be boolean of shape {tuple(self.size)} (rows, columns), "
                    f"got {self.mask.dtype} of shape {tuple(self.mask.shape)}"
                )
            if not self.mask.any():
                raise ValueError("a frame's mask selects no token; leave the frame out instead")

    @cached_property
    def length(self) -> int:
        """Number of tokens."""
        return self.size[0] * self.size[1] if self.mask is None else int(self.mask.sum())

    @property
    def held(self) -> bool:
        """Whether the frame keeps its noise level (it is given) instead of being denoised."""
        return self.sigma is not None

    def ids(self) -> torch.Tensor:
        """Position ids (n, 3) float32: (frame, row, column). `(grid + offset) * scale + (scale - 1) / 2` centres a
        coarse token on the fine tokens it covers (OminiControl2, arXiv 2503.08280)."""
        rows, columns = (
            (torch.arange(n, dtype=torch.float32) + shift) * self.scale + (self.scale - 1) / 2
            for n, shift in zip(self.size, self.offset, strict=True)
        )
        grid = torch.stack(
            [
                torch.full(self.size, float(self.index)),
                rows[:, None].expand(self.size),
                columns[None, :].expand(self.size),
            ],
            dim=-1,
        )
        return grid[self.mask] if self.mask is not None else grid.reshape(-1, 3)


def __getattr__(name: str) -> Any:
    """Names of version 0.1; they go with version 0.3."""
    return renamed(__name__, name, {"FrameLayout": "layout.FrameLayout", "RowGroup": "layout.RowGroup"})
