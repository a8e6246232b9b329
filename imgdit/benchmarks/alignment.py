"""How far a generated image lies from the condition that it follows: shift and distance of edges, in pixels.

Both are read from edges, so that a condition may be another kind of image than the result: a depth map, a photo.

B images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from imgdit.benchmarks.metrics import Interval, bootstrap
from imgdit.images.convert import to_pixels
from imgdit.images.fitting import fit_pixels

EDGES = 0.08
"""Fraction of the pixels that count as edges: those with the steepest slopes."""
_BAND = 0.15
"""Standard deviation, in cycles per pixel, of the frequencies that a shift is read from; finer ones differ between
kinds of images."""


class Alignment(NamedTuple):
    """Distances in pixels of the results. Intervals are 95 % bootstrap intervals of means over images."""

    shift: Interval
    """Length of the shift of an image."""
    rows: Interval
    """Shift downwards."""
    columns: Interval
    """Shift to the right."""
    edges: Interval
    """Mean distance of an edge pixel to the nearest one of the other image, both ways."""
    shifts: torch.Tensor
    """(B, 2): rows and columns by which each result is shifted against its condition."""
    distances: torch.Tensor
    """(B,): distance of edges of each."""

    def __str__(self) -> str:
        def described(name: str, interval: Interval) -> str:
            return f"{name} {interval.value:.2f} px ({interval.low:.2f} to {interval.high:.2f})"

        return (
            f"{described('shift', self.shift)}, {described('edge distance', self.edges)}, {len(self.shifts)} image(s)"
        )


def alignment(conditions: Any, results: Any) -> Alignment:
    """How far results lie from their conditions.

    Args:
        conditions: image, or list of images, as `Condition.image` takes them; fitted to the results as an aligned
            condition is.
        results: as many images of one size.

    Raises:
        ValueError: another number of images, or images without any edge.
    """
    outputs = torch.cat([to_pixels(image) for image in _listed(results)])
    size = (outputs.shape[3], outputs.shape[2])
    inputs = torch.cat([fit_pixels(image, size) for image in _listed(conditions)])
    if len(inputs) != len(outputs):
        raise ValueError(f"got {len(inputs)} condition(s) and {len(outputs)} result(s); expected as many")
    slopes = slope(inputs), slope(outputs)
    for name, values in zip(("condition", "result"), slopes, strict=True):
        flat = (values.flatten(1).amax(1) == 0).nonzero().flatten().tolist()
        if flat:
            raise ValueError(f"{name} {flat[0]} is of one colour; an image without edges has no place")
    shifts = phase_shift(*slopes)
    distances = edge_distance(*(strongest(values) for values in slopes))
    length, rows, columns, edges = (bootstrap(values) for values in (shifts.norm(dim=1), *shifts.T, distances))
    return Alignment(length, rows, columns, edges, shifts, distances)


def _listed(images: Any) -> Sequence[Any]:
    return images if isinstance(images, (list, tuple)) else [images]


def slope(images: torch.Tensor) -> torch.Tensor:
    """Steepness (B, H, W) of images (B, 3, H, W): central differences, the largest of the channels."""
    inner = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    across = (inner[..., 1:-1, 2:] - inner[..., 1:-1, :-2]) / 2
    down = (inner[..., 2:, 1:-1] - inner[..., :-2, 1:-1]) / 2
    return torch.hypot(across, down).amax(1)


def strongest(slopes: torch.Tensor, fraction: float = EDGES) -> torch.Tensor:
    """The steepest pixels of (B, H, W), boolean; pixels without slope are none."""
    flat = slopes.flatten(1)
    least = flat.kthvalue(max(round(flat.shape[1] * (1 - fraction)), 1), dim=1).values
    return (slopes >= least[:, None, None]) & (slopes > 0)


def phase_shift(condition: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Rows and columns (B, 2) by which planes (B, H, W) are shifted against others: the peak of the inverse transform
    of their cross-power spectrum's phase (Kuglin and Hines 1975), between pixels by the Gaussian through three. It is
    sought a second time in what both show, where it lies near zero and the window around it draws it nowhere."""
    found = []
    for one, other in zip(condition, result, strict=True):
        down, right = (round(shift) for shift in _peak(one, other))
        if max(abs(down), abs(right)) * 2 < min(one.shape):
            rest = _peak(_part(one, down, right), _part(other, -down, -right))
            found.append([down + rest[0], right + rest[1]])
        else:
            found.append([float(down), float(right)])
    return torch.tensor(found)


def _part(plane: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """What of a plane (H, W) another one shows too that is shifted against it."""
    rows, columns = plane.shape
    return plane[max(-down, 0) : rows - max(down, 0), max(-right, 0) : columns - max(right, 0)]


def _peak(condition: torch.Tensor, result: torch.Tensor) -> tuple[float, float]:
    """Shift of a plane (H, W) against another."""
    rows, columns = condition.shape
    window = torch.hann_window(rows, periodic=False)[:, None] * torch.hann_window(columns, periodic=False)
    a, b = (torch.fft.fft2(((plane - plane.mean()) * window.to(plane)).double()) for plane in (condition, result))
    product = b * a.conj()
    frequencies = torch.fft.fftfreq(rows)[:, None].square() + torch.fft.fftfreq(columns).square()
    band = torch.exp(-frequencies.double() / (2 * _BAND**2)).to(product.device)
    size = product.abs()
    peak = torch.fft.ifft2(product / (size + 1e-6 * size.mean()) * band).real  # (H, W)
    row, column = divmod(int(peak.argmax()), columns)
    down, right = row + _between(peak[:, column], row), column + _between(peak[row], column)
    return _signed(down, rows), _signed(right, columns)


def _between(line: torch.Tensor, top: int) -> float:
    """Place of a peak between the pixels around its largest one."""
    low, middle, high = (float(line[(top + step) % len(line)].clamp(min=1e-12).log()) for step in (-1, 0, 1))
    bend = low - 2 * middle + high
    return 0.0 if bend >= 0 else max(-0.5, min(0.5, 0.5 * (low - high) / bend))


def _signed(place: float, length: int) -> float:
    return place - length if place > length / 2 else place


def edge_distance(edges: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean distance in pixels of an edge pixel to the nearest of the other edges, the mean of both ways: (B,).

    Args:
        edges, others: boolean (B, H, W), with an edge in each.
    """
    there, back = distance_to(others), distance_to(edges)
    one = [(near[mask].mean() + far[other].mean()) / 2 for near, mask, far, other in zip(there, edges, back, others)]
    return torch.stack(one)


def distance_to(edges: torch.Tensor) -> torch.Tensor:
    """Distance (B, H, W) of every pixel to the nearest edge pixel of boolean (B, H, W), exact: along columns, then
    along rows (Felzenszwalb and Huttenlocher 2012, section 2)."""
    rows, columns = edges.shape[1:]
    far = float(rows + columns)
    place = torch.arange(rows, device=edges.device, dtype=torch.float32)[:, None]
    above = torch.where(edges, place, -far).cummax(1).values
    below = torch.where(edges, place, 2 * far).flip(1).cummin(1).values.flip(1)
    within = torch.minimum(place - above, below - place).clamp(max=far)  # (B, H, W) along columns
    across = torch.arange(columns, device=edges.device, dtype=torch.float32)
    square = (across[:, None] - across).square()  # (W, W)
    parts = [(part.square()[:, :, None, :] + square).amin(-1) for part in within.split(16, dim=1)]
    return torch.cat(parts, dim=1).sqrt()
