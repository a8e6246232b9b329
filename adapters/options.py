"""How the conditions of a call take part in it: the options that `OmniControl.use` and our pipelines share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch

from imgdit.naming import check_choice

Mode = Literal["joint", "independent"]
MODES: tuple[Mode, ...] = ("joint", "independent")


@dataclass(frozen=True, eq=False)
class ConditionOptions:
    """Options of all conditions of a call, by the names of its arguments.

    Raises:
        ValueError: a value that no model takes.
    """

    main_adapter: str | Sequence[str] | None = None
    """Adapters of the text and of the image that is generated. `None`: those active that no condition has; `()`:
    none."""
    mode: Mode | None = None
    """"joint" (a condition sees text and image) or "independent" (only itself). `None`: as each adapter was trained,
    joint where its file does not say."""
    cache: bool | None = None
    """Keep keys and values of independent conditions between steps. `None`: where there are some."""
    image_guidance_scale: float = 1.0
    """s in `v = v_black + s (v - v_black)`, v_black a second pass with black images."""
    region: Any = None
    """Tokens or pixels that are generated where conditions are complements; `None`: all that they leave."""
    generator: torch.Generator | None = None
    """Draws the conditions' latents from the posterior; `None` takes its mode."""

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        scale: Any = self.image_guidance_scale
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"image_guidance_scale is one finite number for all images, got {scale!r}")
        generator: Any = self.generator
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"one torch.Generator draws the latents of all conditions, got {type(generator).__name__}"
            )

    @property
    def main_adapters(self) -> tuple[str, ...] | None:
        """`main_adapter` as a tuple."""
        if self.main_adapter is None:
            return None
        return (self.main_adapter,) if isinstance(self.main_adapter, str) else tuple(self.main_adapter)
