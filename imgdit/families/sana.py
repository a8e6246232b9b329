"""Sana of diffusers."""

from __future__ import annotations

from imgdit.families.step import places_of_planes, timestep_of_config
from imgdit.family import Family

FAMILY = Family(classes=("SanaTransformer2DModel",), places=places_of_planes, timestep=timestep_of_config)
