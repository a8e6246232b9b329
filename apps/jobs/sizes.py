"""Which sizes a model was made for, and what another one costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

AREAS = (0.25, 2.0)
"""Areas, as multiples of a model's own, that models taught on images of many sizes still draw well: FLUX.1 names 0.1
to 2 megapixels, SD3 0.25 to 2, for an own size of 1."""
RATIO = 2.1
"""The longer over the shorter side, likewise: a little over 2:1, sides being rounded to tokens."""


def unsuited(size: tuple[int, int], sizes: Sequence[tuple[int, int]], own: int | None, cell: int) -> str | None:
    """Why a size will hardly look right, and which will; `None` where nothing speaks against it.

    Args:
        size: width and height in pixels.
        sizes: those that the model was taught, if its folder tells them.
        own: side in pixels of its own size, if it has one.
        cell: pixels that sides are multiples of.
    """
    width, height = size
    if sizes:
        if size in sizes:
            return None
        near = sorted(sizes, key=lambda one: abs(math.log(one[0] * height / (one[1] * width))))[:4]
        return f"the model was taught {_listed(near)}; at {width}x{height} shapes will break, take {_listed(near[:1])}"
    if own is None:
        return None
    area, ratio = width * height / own**2, max(width, height) / min(width, height)
    if AREAS[0] <= area <= AREAS[1] and ratio <= RATIO:
        return None
    ratio = min(max(width / height, 1 / 2), 2.0)
    better = (_rounded(own * math.sqrt(ratio), cell), _rounded(own / math.sqrt(ratio), cell))
    return (
        f"the model is made for areas of about {own}x{own}, at {width}x{height} shapes will break or repeat; take "
        f"{_listed(dict.fromkeys([better, (own, own)]))}"
    )


def check_sides(width: int | None, height: int | None, cell: int) -> None:
    """Refuse sides that are no whole number of tokens.

    Raises:
        ValueError: names them in the order width x height, and the nearest size below.
    """
    sides = [side for side in (width, height) if side is not None]
    if any(side < cell or side % cell for side in sides):
        below = "x".join(str(max(side // cell, 1) * cell) for side in sides)
        raise ValueError(
            f"width and height must be multiples of {cell} pixels, got {'x'.join(map(str, sides))}; try {below}"
        )


def duration(seconds: float) -> str:
    """A time to wait, roughly."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _rounded(side: float, cell: int) -> int:
    return max(1, round(side / cell)) * cell


def _listed(sizes: Sequence[tuple[int, int]] | dict[tuple[int, int], None]) -> str:
    return " or ".join(f"{width}x{height}" for width, height in sizes)
