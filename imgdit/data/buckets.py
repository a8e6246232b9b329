"""Aspect-ratio buckets: a few sizes of about the same area, so that the images of a batch fit each other."""

from __future__ import annotations

import math

from imgdit.images.fitting import Size


def bucket_sizes(base: int, step: int, ratio: float = 2.0) -> list[Size]:
    """Sizes whose area is about base x base, narrow to wide.

    Args:
        base: side of the square in pixels; any number.
        step: sides are multiples of it: pixels per token.
        ratio: of the longer to the shorter side, at most.

    Raises:
        ValueError: a base below one step, or a ratio below 1.
    """
    if base < step:
        raise ValueError(f"base={base} pixels is less than a token, which has {step}; make it at least {step}")
    if ratio < 1:
        raise ValueError(f"ratio is the longer side over the shorter, at least 1; got {ratio}")
    side = round(base / step)
    found = {(side, side)}
    for columns in range(1, side + 1):
        rows = round((base / step) ** 2 / columns)
        if rows <= ratio * columns:
            found |= {(columns, rows), (rows, columns)}
    return sorted(((w * step, h * step) for w, h in found), key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket that crops an image least."""
    wanted = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - wanted), bucket))
