"""How many of an image's codes are masked over time (MaskGIT, arXiv 2202.04200, section 3.3; as MMaDA computes it).

At ratio r in [0, 1] of the steps a fraction f(r) of all codes is masked, from 1 at r = 0 to about 0 at r = 1.
"""

from __future__ import annotations

import math
import re

import torch

SCHEDULES = ("cosine", "linear", "pow2", "sigmoid")
"""Names, of which "pow2" stands for any exponent."""
LEAST = 1e-6
"""Least fraction of all schedules but the cosine."""
_POWER = re.compile(r"pow(\d+(?:\.\d+)?)")


def masked_fraction(ratio: torch.Tensor, schedule: str = "cosine") -> torch.Tensor:
    """Fractions of masked codes, float32 of the ratio's shape.

    Args:
        ratio: r in [0, 1].
        schedule: "cosine": cos(π r / 2); "linear": 1 - r; "pow2", "pow2.5", …: 1 - r to that power; "sigmoid":
            (s(3) - s(6 r - 3)) / (s(3) - s(-3)) with the logistic function s.

    Raises:
        ValueError: an unknown schedule.
    """
    check_schedule(schedule)
    ratio = ratio.float()  # whole numbers of codes depend on the rounding of float32
    if schedule == "cosine":
        return _rounded(torch.cos, ratio * math.pi * 0.5)
    if schedule == "linear":
        found = 1 - ratio
    elif schedule == "sigmoid":
        first, now, last = (
            _rounded(torch.sigmoid, x) for x in (ratio.new_tensor(-3.0), 6 * ratio - 3, ratio.new_tensor(3.0))
        )
        found = (last - now) / (last - first)
    else:
        exponent = exponent_of(schedule)
        assert exponent is not None
        found = 1 - _rounded(lambda x: x**exponent, ratio)
    return found.clamp(LEAST, 1.0)


def exponent_of(schedule: str) -> float | None:
    """The exponent in "pow2.5"; `None` for another name."""
    match = _POWER.fullmatch(schedule) if isinstance(schedule, str) else None
    return float(match[1]) if match else None


def check_schedule(schedule: str) -> None:
    """Refuse a name that is no schedule.

    Raises:
        ValueError: it is none.
    """
    exponent = exponent_of(schedule)
    if schedule not in SCHEDULES and not exponent:
        raise ValueError(f"mask_schedule must be one of {', '.join(SCHEDULES)} (any exponent), got {schedule!r}")


def _rounded(function: object, x: torch.Tensor) -> torch.Tensor:
    """A function's value to the nearest float32, so that it is the same on every processor."""
    return function(x.double()).float()  # type: ignore[operator]
