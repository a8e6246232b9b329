"""Hunyuan-DiT of diffusers."""

from __future__ import annotations

from imgdit.families.step import places_of_planes
from imgdit.family import Family

FAMILY = Family(classes=("HunyuanDiT2DModel",), places=places_of_planes)
