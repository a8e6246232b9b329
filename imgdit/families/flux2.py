"""FLUX.2 of diffusers: its activations can be read and changed."""

from __future__ import annotations

from imgdit.families.step import grid_of_ids, one_image
from imgdit.family import Family, timestep_times

FAMILY = Family(
    classes=("Flux2Transformer2DModel",),
    places=lambda model, arguments: one_image(grid_of_ids(arguments["img_ids"])),
    timestep=timestep_times(1000.0),
    joint_parts=r"^single_transformer_blocks$",
    guides_in_batch=False,
)
