"""Where the best learning rate of a sweep lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEAR = 0.01
"""A learning rate is near the best if its loss is within this fraction of the best's."""


class Optimum(NamedTuple):
    """The vertex of the parabola through the lowest point of a curve and its two neighbours."""

    log2lr: float
    loss: float
    low: float
    """Lower end of the interval of log2 learning rates whose loss is within 1 % of the best, by the parabola."""
    high: float
    """Its upper end."""


class NoOptimum(ValueError):
    """A curve has its lowest point at the edge of the grid, or a neighbour without a finite loss."""


@dataclass(frozen=True)
class Curve:
    """Loss over learning rate at one width."""

    width: int
    log2lr: tuple[float, ...]
    """Ascending."""
    loss: tuple[float, ...]
    """Mean over seeds; infinite where a run diverged."""
    optimum: Optimum | None
    refusal: str
    """Why there is no optimum; empty if there is one."""
    seeds: tuple[float, ...]
    """Optimum of each seed's own curve, of those that have one."""


def find_optimum(log2lr: Sequence[float], loss: Sequence[float]) -> Optimum:
    """Fit a parabola through the lowest point and its neighbours.

    Raises:
        NoOptimum: the lowest point is the first or last, or a neighbour's loss is not finite.
    """
    values = [value if math.isfinite(value) else math.inf for value in loss]
    lowest = min(range(len(values)), key=values.__getitem__)
    if not math.isfinite(values[lowest]):
        raise NoOptimum("every learning rate diverged; lower log2lr")
    if lowest in (0, len(values) - 1):
        side = "lower" if lowest == 0 else "higher"
        raise NoOptimum(f"the lowest loss is at the edge of the grid, 2^{log2lr[lowest]:g}; add {side} learning rates")
    x, y = log2lr[lowest - 1 : lowest + 2], values[lowest - 1 : lowest + 2]
    if not np.isfinite(y).all():
        raise NoOptimum(f"the run next to the lowest loss, 2^{log2lr[lowest]:g}, diverged; use a finer grid")
    a, b, c = np.polyfit(np.asarray(x) - x[1], y, 2)
    vertex = -b / (2 * a)
    best = c - b * b / (4 * a)
    reach = math.sqrt(NEAR * abs(best) / a)
    return Optimum(float(x[1] + vertex), float(best), float(x[1] + vertex - reach), float(x[1] + vertex + reach))


def curve(width: int, losses: Mapping[int, Mapping[float, float]]) -> Curve:
    """Average the seeds of one width and find its optimum.

    Args:
        width: of the model.
        losses: seed -> log2 learning rate -> held-out loss; the same rates for every seed.
    """
    rates = sorted(next(iter(losses.values())))
    mean = tuple(float(np.mean([by_rate[rate] for by_rate in losses.values()])) for rate in rates)
    optimum, refusal = None, ""
    try:
        optimum = find_optimum(rates, mean)
    except NoOptimum as error:
        refusal = str(error)
    seeds = []
    for by_rate in losses.values():
        try:
            seeds.append(find_optimum(rates, [by_rate[rate] for rate in rates]).log2lr)
        except NoOptimum:
            continue
    return Curve(width, tuple(rates), mean, optimum, refusal, tuple(seeds))


def loss_at(curve: Curve, log2lr: float) -> float:
    """Loss at a learning rate of the grid, or between two by a parabola through the three nearest points."""
    if log2lr in curve.log2lr:
        return curve.loss[curve.log2lr.index(log2lr)]
    order = sorted(range(len(curve.log2lr)), key=lambda i: abs(curve.log2lr[i] - log2lr))[:3]
    x, y = [curve.log2lr[i] for i in order], [curve.loss[i] for i in order]
    if not np.isfinite(y).all():
        return math.inf
    return float(np.polyval(np.polyfit(np.asarray(x) - log2lr, y, 2), 0.0))


def shift(curves: Sequence[Curve]) -> float | None:
    """Distance in log2 from the narrowest width's optimum to the widest's; `None` if either has none."""
    first, last = curves[0].optimum, curves[-1].optimum
    return None if first is None or last is None else last.log2lr - first.log2lr
