"""Metrics of images, depth, segmentation and fractions, with intervals.

B batch, H x W pixels. Metrics of batches return one number per sample, so that intervals can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Interval(NamedTuple):
    """An estimate between two bounds."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, z: float = 1.96) -> Interval:
    """A share and its score interval (Wilson 1927), 95 % by default."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"a share needs 0 <= successes <= trials and a trial, got {successes} of {trials}")
    fraction, square = successes / trials, z * z / trials
    middle = (fraction + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(fraction * (1 - fraction) / trials + square / (4 * trials))
    return Interval(fraction, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(values: Sequence[float] | torch.Tensor, rounds: int = 1000, seed: int = 0) -> Interval:
    """A mean and its 95 % percentile interval (Efron 1979)."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"a mean needs a row of numbers, got shape {numbers.shape}")
    rng = np.random.default_rng(seed)
    means = numbers[rng.integers(len(numbers), size=(rounds, len(numbers)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(numbers.mean()), float(low), float(high))


def abs_rel(depth: torch.Tensor, truth: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of |depth - truth| / truth, of (B, 1, H, W) each: (B,); with a boolean mask `where`, of its pixels."""
    apart = ((depth - truth).abs() / truth).flatten(1)
    if where is None:
        return apart.mean(1)
    counted = where.flatten(1)
    return (apart * counted).sum(1) / counted.sum(1)


def fitted(depth: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The depth with the scale and shift of its inverse that come nearest to the truth, each image its own: what
    one image cannot tell is left out (MiDaS, arXiv 1907.01341, section 5). (B, 1, H, W) each."""
    inverse, wanted = (1 / x.double().flatten(1) for x in (depth, truth))
    columns = torch.stack([inverse, torch.ones_like(inverse)], dim=-1)  # (B, pixels, 2)
    found = columns @ torch.linalg.lstsq(columns, wanted[..., None]).solution
    return (1 / found.squeeze(-1).clamp(min=1 / (2 * float(truth.max())))).to(truth.dtype).view_as(truth)


def delta_1(depth: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Fraction of pixels whose depth is right to a factor of 1.25, (B,)."""
    ratio = torch.maximum(depth / truth, truth / depth.clamp(min=1e-6))
    return (ratio < 1.25).flatten(1).float().mean(1)


def mean_iou(classes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Intersection over union of (B, H, W) each, the mean over the classes that either shows: (B,)."""
    scores = []
    for generated, real in zip(classes, truth, strict=True):
        present = torch.cat([generated.unique(), real.unique()]).unique()
        overlap = [((generated == c) & (real == c)).sum() / ((generated == c) | (real == c)).sum() for c in present]
        scores.append(torch.stack(overlap).mean())
    return torch.stack(scores)


def edge_f1(edges: torch.Tensor, truth: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """F-measure of boolean edges (B, 1, H, W); a pixel counts as found within `tolerance` pixels: (B,)."""
    near = [F.max_pool2d(x.float(), 2 * tolerance + 1, stride=1, padding=tolerance) > 0 for x in (edges, truth)]
    right, found = (edges & near[1]).flatten(1).sum(1), (truth & near[0]).flatten(1).sum(1)
    precision = right / edges.flatten(1).sum(1).clamp(min=1)
    recall = found / truth.flatten(1).sum(1).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [0, 1]: (B,)."""
    return -10 * (images - truth).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity of images (B, 3, H, W) in [0, 1] (Wang et al. 2004), Gaussian window of 11: (B,)."""
    steps = torch.arange(11, dtype=images.dtype, device=images.device) - 5
    line = torch.exp(-steps.square() / (2 * 1.5**2))
    window = (line[:, None] * line)[None, None] / line.sum().square()
    channels = images.shape[1]

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window.expand(channels, 1, -1, -1), groups=channels)

    a, b = blur(images), blur(truth)
    aa, bb, ab = blur(images * images) - a * a, blur(truth * truth) - b * b, blur(images * truth) - a * b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return values.flatten(1).mean(1)


def frechet(features: torch.Tensor, truth: torch.Tensor) -> float:
    """Fréchet distance between the normal distributions of two sets of features (N, D) (arXiv 1706.08500)."""
    if min(len(features), len(truth)) < 2:
        raise ValueError(f"a distribution needs two samples or more, got {len(features)} and {len(truth)}")
    a, b = (x.double() for x in (features, truth))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of sqrt(cov_a cov_b) is that of the symmetric sqrt(cov_a) cov_b sqrt(cov_a) without its square root.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
