"""DiT of diffusers, class-conditional, and the older class of the same blocks."""

from __future__ import annotations

from imgdit.families.step import places_of_planes
from imgdit.family import Family

FAMILY = Family(
    classes=("DiTTransformer2DModel", "Transformer2DModel"),
    places=places_of_planes,
    prompt_first=True,  # its pipeline puts the labels before the null labels
)
