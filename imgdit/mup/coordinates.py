"""The coordinate check: how large activations are after a few steps, at several widths.

Under μP they do not depend on the width; under the standard parametrisation at least the output grows with it (Tensor
Programs V, arXiv 2203.03466, appendix D.1). A slope is that of log2 mean |activation| over log2 width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

OUTPUT = "output"
"""Name of the model's own output."""

Means = dict[str, list[float]]
"""Module -> mean |activation| at each step."""


class Slope(NamedTuple):
    """How one module's activations go with the width."""

    module: str
    at_start: float | None
    """Before the first update; `None` where the activation is 0, as after a zero initialisation."""
    at_end: float | None
    """At the last step."""


@dataclass(frozen=True)
class CoordinateCheck:
    """Activations of one parametrisation."""

    widths: tuple[int, ...]
    means: dict[str, list[list[float]]]
    """Module -> [step][width], the mean over seeds of mean |activation|. Step 0 is before the first update."""

    def slopes(self) -> list[Slope]:
        """One per module, in the order of the forward pass."""
        return [
            Slope(module, slope(self.widths, steps[0]), slope(self.widths, steps[-1]))
            for module, steps in self.means.items()
        ]

    def beyond(self, tolerance: float) -> list[Slope]:
        """Modules whose last slope is steeper than the tolerance, up or down, or not finite."""
        return [s for s in self.slopes() if s.at_end is not None and not abs(s.at_end) <= tolerance]


def slope(widths: Sequence[int], values: Sequence[float]) -> float | None:
    """Least-squares slope of log2 value over log2 width; `None` if a value is 0, NaN if one is not finite."""
    if min(values) == 0.0:
        return None
    if not np.isfinite(values).all():
        return float("nan")
    return float(np.polyfit(np.log2(widths), np.log2(values), 1)[0])


def watched_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What to look at: the model's parts, its blocks, and each block's parts and modulations."""
    found: dict[str, nn.Module] = {}
    for name, part in model.named_children():
        blocks = part.named_children() if isinstance(part, nn.ModuleList) else [("", part)]
        for number, block in blocks:
            place = f"{name}.{number}".rstrip(".")
            for inner, child in block.named_children():
                found[f"{place}.{inner}"] = child
                linear = getattr(child, "linear", None)  # of an adaptive norm, which is not called itself
                if isinstance(linear, nn.Module):
                    found[f"{place}.{inner}.linear"] = linear
            found[place] = block
    return {name: module for name, module in found.items() if any(True for _ in module.parameters())}


def record(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module], torch.Tensor], steps: int
) -> Means:
    """Train on one batch and record.

    Args:
        model: changed by it.
        optimizer: of the model.
        loss: of the same batch with the same noise each time.
        steps: forward passes; the optimiser steps between them.
    """
    means: Means = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for suffix, tensor in _tensors(output):
                means.setdefault(name + suffix, []).append(float(tensor.detach().float().abs().mean()))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in watched_modules(model).items()]
    handles.append(model.register_forward_hook(look(OUTPUT)))
    try:
        for step in range(steps):
            value = loss(model)
            if step + 1 < steps:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    twice = [name for name, values in means.items() if len(values) != steps]
    # A module that is called more than once per pass, such as an embedder of two levels, has no one activation.
    return {name: values for name, values in means.items() if name not in twice}


def average(widths: Sequence[int], runs: Mapping[int, Sequence[Means]]) -> CoordinateCheck:
    """Mean over seeds.

    Args:
        widths: in the order of the result.
        runs: width -> one recording per seed.
    """
    modules = list(runs[widths[0]][0])
    means = {}
    for module in modules:
        by_width = [np.mean([run[module] for run in runs[width]], axis=0) for width in widths]
        means[module] = np.stack(by_width, axis=1).tolist()
    return CoordinateCheck(tuple(widths), means)


def _tensors(output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of an output: the image stream's has no suffix, the text's is the second."""
    if isinstance(output, torch.Tensor):
        yield "", output
    elif hasattr(output, "sample"):
        yield "", output.sample
    elif isinstance(output, (tuple, list)):
        for suffix, part in zip(("", ".context"), output):
            if isinstance(part, torch.Tensor):
                yield suffix, part
