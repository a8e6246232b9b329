"""A condition: an image whose tokens steer a generation, and how the transformer is to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from imgdit.display import Shown
from imgdit.frames import Frame
from imgdit.images.masks import to_mask
from imgdit.lora.files import AdapterInfo
from imgdit.naming import check_choice

PLACES = ("aligned", "subject", "centred")
Level = Literal["clean", "image"]
ActsOn = Literal["condition", "all"]


@dataclass(frozen=True, eq=False)
class Condition(Shown):
    """An image that controls a generation through its adapter (OminiControl, arXiv 2411.15098 and 2503.08280)."""

    image: Any
    """PIL image of any mode; array (H, W), (H, W, C) or (B, H, W, C); tensor (C, H, W) or (B, C, H, W); or a list of
    these, one per prompt or per sample. `imgdit.images.convert` says what values mean; transparent is white."""
    adapter: str
    """Name of the loaded LoRA that reads it."""
    position: Literal["aligned", "subject", "centred"] | tuple[float, float] = "aligned"
    """"aligned": over the image that is generated, to whose size it is fitted (divided by `scale`); "subject": to its
    left, by the condition's width, and no larger; "centred": of its own size, its middle over the image's; or (rows,
    columns) that its corner lies from the image's, in tokens of the image: then its size stays, a whole number of
    tokens."""
    scale: float = 1.0
    """Side of a token of the condition in tokens of the image: 2 for a compact condition of half the side."""
    strength: float = 1.0
    """γ: log γ is added to the attention logits between the condition and everything else. 1 is no bias, 0 leaves the
    condition out."""
    start: float = 0.0
    """Fraction of the steps after which it begins to act."""
    end: float = 1.0
    """Fraction of the steps after which it acts no more."""
    mask: Any = None
    """Which tokens are present: over tokens (rows, columns), or over the image's pixels, where a token counts if all
    its pixels do. White counts, see `imgdit.images.masks`. `None`: all."""
    index: float | None = None
    """First position coordinate: 0 is the image that is generated; FLUX.2's own references have 10, 20, …, those of
    Qwen-Image 1, 2, … `None`: as its adapter was trained, 0 where its file does not say."""
    level: Level | None = None
    """Noise level of its tokens: "clean" (0), or "image", that of the image that is generated. `None`: as its adapter
    was trained, clean where its file does not say."""
    acts_on: ActsOn | None = None
    """Tokens that its adapter acts on: the "condition"'s, or "all" while the condition acts, as a LoRA of the model
    does; the condition then sees everything, as the image does. `None`: as its adapter was trained, the condition's
    where its file does not say."""
    complement: bool = False
    """The image shows what surrounds the tokens that are made (token integration, OminiControl2): only tokens that
    `mask` leaves out are generated, the others are the image's."""

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, str) or not self.adapter:
            raise ValueError(f"a condition is read by a loaded adapter; expected its name, got {self.adapter!r}")
        if self.position not in PLACES and (isinstance(self.position, str) or len(self.position) != 2):
            raise ValueError(
                f"position must be 'aligned', 'subject', 'centred' or (rows, columns), got {self.position!r}"
            )
        if self.index is not None and not math.isfinite(self.index):
            raise ValueError(f"index is the first position coordinate, a finite number; got {self.index}")
        if self.level is not None:
            check_choice("level", self.level, ("clean", "image"))
        if self.acts_on is not None:
            check_choice("acts_on", self.acts_on, ("condition", "all"))
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, got {self.scale}")
        check_acting(self.strength, self.start, self.end)
        if self.complement:
            if self.mask is None:
                raise ValueError("complement=True needs mask=, the tokens that are known; the others are generated")
            if self.strength == 0.0:
                raise ValueError("complement=True with strength=0 would leave out what the image is completed from")
            if self.level == "image":
                raise ValueError("complement=True needs the image's clean tokens, got level='image'")
            if self.position != "aligned" or self.scale != 1.0 or (self.start, self.end) != (0.0, 1.0):
                raise ValueError(
                    "complement=True puts the condition's tokens into the image; it needs position='aligned', "
                    f"scale=1, start=0 and end=1, got {self.position!r}, {self.scale}, {self.start} and {self.end}"
                )

    def trained_as(self, info: AdapterInfo) -> Condition:
        """The condition, with what it leaves open as its adapter was trained."""
        level, acts_on = self.level or info.level or "clean", self.acts_on or info.acts_on or "condition"
        index = (info.index or 0.0) if self.index is None else self.index
        if self.complement and self.level is None:
            level = "clean"
        return replace(self, index=index, level=level, acts_on=acts_on)  # type: ignore[arg-type]

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, numbered from 0 (the rule of diffusers' ControlNets)."""
        return acts_in(step, steps, self.start, self.end)

    def read_size(self, source_size: tuple[int, int], patch: int, target: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in pixels at which an image is read; it is scaled and cut to them (`imgdit.images.fit`).

        Args:
            given: height and width of the image.
            patch: pixels per side of a token.
            target: rows and columns of tokens of the image that is generated; `None`: not known.

        Raises:
            ValueError: a condition that is placed by numbers and has no whole number of tokens.
        """
        whole = (max(round(source_size[0] / patch), 1) * patch, max(round(source_size[1] / patch), 1) * patch)
        if not isinstance(self.position, str) and whole != source_size:
            raise ValueError(
                f"a condition's image must be a multiple of {patch} pixels high and wide, got "
                f"{source_size[0]}x{source_size[1]}; "
                f"resize it to {whole[0]}x{whole[1]}"
            )
        if target is None or not isinstance(self.position, str):
            return whole
        over = (max(round(target[0] / self.scale), 1) * patch, max(round(target[1] / self.scale), 1) * patch)
        if self.position == "centred":
            return whole
        is_larger = source_size[0] > over[0] or source_size[1] > over[1]
        return over if self.position == "aligned" or is_larger else whole

    def frame(
        self,
        size: tuple[int, int],
        patch: int,
        sees: Literal["joint", "self"],
        source_size: tuple[int, int] | None = None,
        target: tuple[int, int] | None = None,
    ) -> Frame:
        """The frame of its tokens.

        Args:
            size: rows and columns of tokens.
            patch: pixels per side of a token.
            sees: everything but other conditions, or only itself.
            given: height and width of its image before it was fitted to its tokens.
            target: rows and columns of tokens of the image that is generated, which it may be centred on; `None`: not
                known.
        """
        if self.position == "subject":
            rows, columns = 0.0, -size[1] * self.scale
        elif self.position == "centred" and target is not None:
            rows, columns = (_middle(of) - _middle(own) * self.scale for of, own in zip(target, size))
        else:
            rows, columns = (0.0, 0.0) if isinstance(self.position, str) else self.position
        clean = self.level != "image"
        return Frame(
            size,
            sigma=0.0 if clean else None,
            adapter=self.adapter,
            sees=sees,
            index=self.index or 0.0,
            # Added before the frame's scale: the trainer of the reference scales first, then shifts.
            offset=(rows / self.scale, columns / self.scale),
            scale=self.scale,
            guidance=1.0 if clean else None,
            mask=None if self.mask is None else to_mask(self.mask, size, patch, source_size),
            strength=self.strength,
            reference=not clean,
            everywhere=self.acts_on == "all",
        )


def check_acting(strength: float, start: float, end: float) -> None:
    """Refuse a strength or a range of steps that nothing can have."""
    if not 0.0 <= strength < float("inf"):
        raise ValueError(f"strength must be 0 or more (1: no bias, 0: no condition), got {strength}")
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"expected 0 <= start <= end <= 1 (fractions of the steps), got {start} and {end}")


def acts_in(step: int, steps: int, start: float, end: float) -> bool:
    """Whether something acts in a step, numbered from 0, that acts between two fractions of the steps."""
    return step / steps >= start and (step + 1) / steps <= end


def _middle(tokens: int) -> int:
    """The token of a row or column that lies at 0 where a model counts from the middle (Qwen-Image)."""
    return -(-tokens // 2)
