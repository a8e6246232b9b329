"""A condition: a picture whose tokens steer a generation, and how the transformer is to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from imgdit.frames import Frame
from imgdit.images.masks import to_mask


@dataclass(frozen=True, eq=False)
class Condition:
    """A picture that controls a generation through its adapter (OminiControl, arXiv 2411.15098 and 2503.08280)."""

    image: Any
    """PIL picture; array (H, W), (H, W, 3) in 0..255 (uint8) or [0, 1]; tensor (3, H, W) or (B, 3, H, W) in [0, 1]."""
    adapter: str
    """Name of the loaded LoRA that reads it."""
    position: Literal["aligned", "subject"] | tuple[float, float] = "aligned"
    """"aligned": on the picture that is made; "subject": to its left, by the condition's width; or (rows, columns)
    that the condition's corner lies from the picture's, in tokens of the picture."""
    scale: float = 1.0
    """Side of a token of the condition in tokens of the picture: 2 for a compact condition of half the side."""
    strength: float = 1.0
    """γ: log γ is added to the attention logits between the condition and everything else. 1 is no bias, 0 leaves the
    condition out."""
    start: float = 0.0
    """Share of the steps after which it begins to act."""
    end: float = 1.0
    """Share of the steps after which it acts no more."""
    mask: Any = None
    """Which tokens are present: boolean (rows, columns) of tokens, or of the picture's pixels, where a token counts if
    all its pixels do. `None`: all."""
    complement: bool = False
    """The picture shows what surrounds the tokens that are made (token integration, OminiControl2): only tokens that
    `mask` leaves out are generated, the others are the picture's."""

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, str) or not self.adapter:
            raise ValueError(f"a condition is read by a loaded adapter; expected its name, got {self.adapter!r}")
        if self.position not in ("aligned", "subject") and (isinstance(self.position, str) or len(self.position) != 2):
            raise ValueError(f"position must be 'aligned', 'subject' or (rows, columns), got {self.position!r}")
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not 0.0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be 0 or more (1: no bias, 0: no condition), got {self.strength}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"expected 0 <= start <= end <= 1 (shares of the steps), got {self.start} and {self.end}")
        if self.complement:
            if self.mask is None:
                raise ValueError("complement=True needs mask=, the tokens that are known; the others are generated")
            if self.strength == 0.0:
                raise ValueError("complement=True with strength=0 would leave out what the picture is completed from")
            if self.position != "aligned" or self.scale != 1.0 or (self.start, self.end) != (0.0, 1.0):
                raise ValueError(
                    "complement=True puts the condition's tokens into the picture; it needs position='aligned', "
                    f"scale=1, start=0 and end=1, got {self.position!r}, {self.scale}, {self.start} and {self.end}"
                )

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, numbered from 0 (the rule of diffusers' ControlNets)."""
        return step / steps >= self.start and (step + 1) / steps <= self.end

    def frame(self, size: tuple[int, int], patch: int, sees: Literal["joint", "self"]) -> Frame:
        """The frame of its tokens.

        Args:
            size: rows and columns of tokens.
            patch: pixels per side of a token.
            sees: everything but other conditions, or only itself.
        """
        named = {"aligned": (0.0, 0.0), "subject": (0.0, -size[1] * self.scale)}
        rows, columns = named[self.position] if isinstance(self.position, str) else self.position
        return Frame(
            size,
            sigma=0.0,
            adapter=self.adapter,
            sees=sees,
            # Added before the frame's scale: the trainer of the reference scales first, then shifts.
            offset=(rows / self.scale, columns / self.scale),
            scale=self.scale,
            guidance=1.0,
            mask=self.token_mask(size, patch),
            strength=self.strength,
        )

    def token_mask(self, size: tuple[int, int], patch: int) -> torch.Tensor | None:
        """`mask` over tokens (rows, columns)."""
        return None if self.mask is None else to_mask(self.mask, size, patch)
