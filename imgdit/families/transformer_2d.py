"""diffusers' `Transformer2DModel` as a denoiser of its own; inside U-Nets it belongs to their family."""

from __future__ import annotations

from imgdit.families.step import places_of_planes
from imgdit.family import Family

FAMILY = Family(classes=("Transformer2DModel",), places=places_of_planes)
