"""`MMDiT`, the library's own transformer with FLUX's and SD3's parts; it takes conditions as frames itself."""

from __future__ import annotations

import math
from typing import Any

from imgdit.families.names import ROLES
from imgdit.families.step import grid_of_ids, one_image, packed_tokens, places_of_planes, timestep_of_config
from imgdit.family import Arguments, Family, Grid, LoraNames, PromptEncoding
from imgdit.layout import take_rows


def places_of_layout(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...] | None:
    """Rows and grids of the frames that are generated, by the call's layout; without one, of its only frame. Where
    texts alone are generated, of the images that they are about; none where these are read from a cache."""
    layout = arguments.get("layout")
    if layout is not None:
        frames = [(rows, layout.frames[i]) for rows, i in zip(layout.rows, layout.live, strict=True)]
        read = bool(layout.predicted_texts) and not layout.predicted_frames
        return tuple((rows, frame.size) for rows, frame in frames if frame.predicted or read)
    if arguments.get("img_ids") is not None:
        return one_image(grid_of_ids(arguments["img_ids"]))
    return places_of_planes(model, arguments)


def timestep_of_layout(model: Any, arguments: Arguments) -> float:
    """That of the frames that are generated, where each frame has its own."""
    timestep, layout = arguments["timestep"], arguments.get("layout")
    if layout is not None and getattr(timestep, "ndim", 0) == 2:
        timestep = take_rows(timestep, layout.predicted_frames)
    return timestep_of_config(model, {"timestep": timestep})


def _patch(model: Any, vae: Any) -> int:
    return math.isqrt(model.token_channels // vae.config.latent_channels)


SETTINGS = (
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)
"""Settings that `MMDiT`, FLUX.1 and SD3 call the same."""

FAMILY = Family(
    classes=("MMDiT",),
    places=places_of_layout,
    timestep=timestep_of_layout,
    joint_parts=r"^single_transformer_blocks$",
    tokens=packed_tokens(patch=_patch, channels=lambda model: model.token_channels),
    lora=LoraNames(inputs=("x_embedder", "pos_embed.proj")),
    prompts={"ImgDiTPipeline": PromptEncoding((0, 2, 4))},
    mup=ROLES,
)
