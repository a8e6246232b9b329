"""Prompts about scenes for the recipes of sparse autoencoders."""

from __future__ import annotations

from random import Random

from imgdit.scenes.captions import caption
from imgdit.scenes.labels import LABELS, label_prompts
from imgdit.scenes.world import draw


def captions(count: int, seed: int) -> list[str]:
    """Captions of `count` scenes drawn at random."""
    found = []
    for i in range(count):
        rng = Random(f"sae {seed} {i}")
        found.append(caption(draw(rng), rng))
    return found


def concepts(count: int, seed: int) -> list[dict[str, list[str]]]:
    """`count` prompts for each style, and for each object."""
    return [label_prompts(count, seed, kind) for kind in LABELS]
