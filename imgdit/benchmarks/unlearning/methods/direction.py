"""Unlearning by one dense direction: the difference of mean activations, taken out of every token.

S timesteps, n tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from imgdit.benchmarks.unlearning.methods.material import Material, Stream, Unlearned
from imgdit.sae.hooks import hooked
from imgdit.sae.streams import Tokens


def without_direction(
    pipe: Any, concepts: Sequence[str], material: Material, *, strength: float = 1.0, stream: Stream = "image"
) -> Unlearned:
    """At the SAEs' hookpoints, each token loses what it has along (mean with the concept − mean without it).

    Args:
        stream: whose tokens.
        strength: 1 puts a token at the mean of the images without the concept along the direction; 2 as far beyond.
    """
    places = {
        hookpoint: [_Direction.of(material, concept, hookpoint) for concept in concepts]
        for hookpoint in material.streams(pipe).get(stream, ())
    }
    source = {hookpoint: sae.config.source for hookpoint, sae in material.saes.items()}

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        steered = {hookpoint: _Steering(found, strength) for hookpoint, found in places.items() if found}
        with hooked(pipe, steered, source=source):
            yield {}

    entries = [direction for found in places.values() for direction in found]
    return Unlearned(attach, sum(4 * (e.unit.numel() + len(e.timesteps)) for e in entries))


class _Direction(NamedTuple):
    timesteps: torch.Tensor
    """(S,)"""
    unit: torch.Tensor
    """(S, d) of norm 1."""
    middle: torch.Tensor
    """(S,) where the images without the concept lie along it."""

    @classmethod
    def of(cls, material: Material, concept: str, hookpoint: str) -> _Direction:
        statistics = material.recorded(concept, hookpoint)
        others = statistics.others(concept, statistics.inputs)
        unit = F.normalize(statistics.inputs[concept] - others, dim=1)
        return cls(torch.tensor(statistics.timesteps), unit, (others * unit).sum(1))


class _Steering:
    def __init__(self, directions: Sequence[_Direction], strength: float) -> None:
        self.directions, self.strength = directions, strength

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        x = tokens.values
        for direction in self.directions:
            step = int((direction.timesteps - tokens.call.timestep).abs().argmin())
            unit = direction.unit[step].to(x)
            along = x @ unit - direction.middle[step].to(x)  # (B, n)
            x = x - self.strength * along[..., None] * unit
        return x
