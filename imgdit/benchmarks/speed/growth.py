"""How time and memory of a step grow with tokens, frames, conditions, batch and width, beside the formulas.

The formulas are those of `imgdit.mup.cost`: floating-point operations of a forward pass (three of them in a training
step), and for memory the activations: in proportion to batch * tokens * width, in a training step 17 numbers of it per
block and the gradient of the largest weight, which is there twice before it is added.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from imgdit.benchmarks.speed.timing import peak_memory, timed
from imgdit.frames import Frame
from imgdit.kernels import prefer_onednn
from imgdit.layout import FrameLayout
from imgdit.models.mmdit import MMDiT
from imgdit.mup.cost import ACTIVATION_BYTES, model_cost
from imgdit.plotting import panels, save_figure

Work = Literal["forward", "training step"]

TEXT, SIDE, WIDTH, HEAD_DIM = 64, 16, 128, 32
"""Where an axis does not say otherwise: one frame of 16 x 16 tokens, batch 1."""
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (256, 1024, 4096, 16384),
    "frames": (1, 2, 4, 8, 12),
    "conditions": (0, 1, 2, 4, 8),
    "batch": (1, 2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
}
MOST_TRAINED = 4096
"""Tokens up to which training steps are measured: attention backwards over 16,384 takes a minute on a CPU."""
TINY: dict[str, tuple[int, ...]] = {name: values[:2] for name, values in AXES.items()}


class Point(NamedTuple):
    """One measured size."""

    work: Work
    axis: str
    value: int
    seconds: float
    """Median of a step."""
    flops: float
    """Of the step, by the formula."""
    memory: int
    """Peak bytes of tensors that a step holds besides the model."""
    formula: float
    """What `memory` should be in proportion to."""


class Growth(NamedTuple):
    """How one axis grows: the exponents p of y = c x^p, x what the formula gives. At most 1: no faster than it."""

    work: Work
    axis: str
    time: float
    memory: float


def measure(
    axes: dict[str, tuple[int, ...]] = AXES,
    *,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Point]:
    """Steps of an MMDiT with one double and one single block, every axis on its own."""
    for axis, values in axes.items():
        for value in values:
            yield _point("forward", axis, value, rounds, torch.device(device), dtype)
            if axis != "tokens" or value <= MOST_TRAINED or torch.device(device).type == "cuda":
                yield _point("training step", axis, value, rounds, torch.device(device), dtype)


def growth(points: Iterable[Point]) -> list[Growth]:
    """Exponents of all axes, by least squares of the logarithms."""
    lines: dict[tuple[Work, str], list[Point]] = {}
    for point in points:
        lines.setdefault((point.work, point.axis), []).append(point)
    return [
        Growth(
            work,
            axis,
            exponent([p.flops for p in line], [p.seconds for p in line]),
            exponent([p.formula for p in line], [p.memory for p in line]),
        )
        for (work, axis), line in lines.items()
    ]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y = c x^p by least squares of the logarithms."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def plot(points: Sequence[Point], path: str | Path) -> Path:
    """Seconds (above) and bytes (below) against each axis, lines of the formulas through the largest size."""
    names = list(dict.fromkeys(point.axis for point in points))
    figure, axes = panels(len(names), 2, fraction=False)
    for column, name in enumerate(names):
        for work in ("forward", "training step"):
            line = [point for point in points if (point.axis, point.work) == (name, work)]
            x = [point.value for point in line]
            rows: list[tuple[str, list[float], list[float]]] = [
                ("seconds", [p.seconds for p in line], [p.flops for p in line]),
                ("bytes", [float(p.memory) for p in line], [p.formula for p in line]),
            ]
            for row, (label, measured, formula) in enumerate(rows):
                axis = axes[row * len(names) + column]
                (drawn,) = axis.plot(x, measured, marker="o", label=work)
                scale = measured[-1] / formula[-1]
                axis.plot(x, [scale * v for v in formula], "--", color=drawn.get_color(), label=f"{work}, formula")
                axis.set(xlabel=name, ylabel=label, yscale="log")
                axis.set_xscale("symlog" if 0 in x else "log", base=2)
                if work == "forward":  # measured at every size
                    axis.set_xticks(x, labels=map(str, x), minor=False)
    axes[0].legend()
    return save_figure(figure, path)


def _point(work: Work, axis: str, value: int, rounds: int, device: torch.device, dtype: torch.dtype) -> Point:
    model = _model(value if axis == "width" else WIDTH).to(device, dtype)
    prefer_onednn(model)
    batch = value if axis == "batch" else 1
    frames = _frames(axis, value)
    layout = FrameLayout.build(frames, TEXT)
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    inputs = {
        "hidden_states": torch.randn(batch, layout.image_length, model.token_channels, **to),
        "encoder_hidden_states": torch.randn(batch, TEXT, model.config.joint_attention_dim, **to),
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim, **to),
        "timestep": torch.full((batch,), 0.5, **to),
        "layout": layout,
    }

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    def training_step() -> None:
        model(**inputs).sample.square().mean().backward()

    call = forward if work == "forward" else training_step
    call()  # once; gradients are part of the model from now on
    seconds = statistics.median(timed(call, device) for _ in range(rounds))
    cost = model_cost(model, layout.image_length, TEXT)
    flops = batch * cost.forward_flops * (1 if work == "forward" else 3)
    formula = batch * cost.tokens * cost.width
    if work == "training step":
        largest = max(p.numel() for p in model.parameters())
        formula = (ACTIVATION_BYTES / 2 * cost.blocks * formula + largest) * dtype.itemsize  # 34 are 17 half numbers
    return Point(work, axis, value, seconds, flops, peak_memory(call, device), formula)


def _model(width: int) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=width // HEAD_DIM,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    )


def _frames(axis: str, value: int) -> list[Frame]:
    side = math.isqrt(value) if axis == "tokens" else SIDE
    generated = [Frame((side, side), index=float(i)) for i in range(value if axis == "frames" else 1)]
    conditions = value if axis == "conditions" else 0
    return generated + [Frame((side, side), sigma=0.0, offset=(0, side * (i + 1))) for i in range(conditions)]
