"""PixArt-α and PixArt-Σ of diffusers."""

from __future__ import annotations

from imgdit.families.dit import BASIC_BLOCKS, BASIC_BRANCHES, BASIC_QUERIES
from imgdit.families.step import places_of_planes
from imgdit.family import Family
from imgdit.mup.structure import Structure

_ROLES = Structure(
    roles=(
        ("pos_embed.proj.weight", "input"),
        ("caption_projection.linear_1.weight", "input"),
        ("caption_projection.linear_2.weight", "hidden"),
        ("adaln_single.emb.*_embedder.linear_1.weight", "input"),
        ("adaln_single.emb.*_embedder.linear_2.weight", "hidden"),
        ("adaln_single.linear.weight", "modulation"),
        # PixArt-α draws them with width^-1/2, which would vanish with the width; its μP version takes 0.02.
        ("*scale_shift_table", "input", 0.02),
        ("proj_out.weight", "output"),
        ("proj_out.bias", "finite"),
        *BASIC_BLOCKS,
        ("*.bias", "vector"),
    ),
    queries=BASIC_QUERIES,
    branches=BASIC_BRANCHES,
    blocks=("transformer_blocks.*",),
)

FAMILY = Family(classes=("PixArtTransformer2DModel",), places=places_of_planes, mup=_ROLES)
