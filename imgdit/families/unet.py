"""The U-Nets of diffusers: Stable Diffusion 1, 2 and XL, and unconditional ones. They work on planes."""

from __future__ import annotations

from imgdit.family import Family

FAMILY = Family(
    classes=("UNet2DConditionModel", "UNet2DModel"),
    places=lambda model, arguments: None,
    latents=lambda arguments: arguments["sample"],
    image_places={"Transformer2DModel": 0},
    plane_parts=("Transformer2DModel",),
)
