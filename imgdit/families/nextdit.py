"""`NextDiT`, the library's backbone of OneDiffusion; it takes frames itself."""

from __future__ import annotations

from imgdit.families.mmdit import places_of_layout, timestep_of_layout
from imgdit.family import Family

FAMILY = Family(classes=("NextDiT",), places=places_of_layout, timestep=timestep_of_layout)
