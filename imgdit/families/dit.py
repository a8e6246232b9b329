"""DiT of diffusers, class-conditional."""

from __future__ import annotations

from imgdit.families.step import places_of_planes
from imgdit.family import Family
from imgdit.mup.structure import Kind, Structure

# Blocks of diffusers' `BasicTransformerBlock`, which PixArt has too.
BASIC_BLOCKS: tuple[tuple[str, Kind], ...] = (
    ("transformer_blocks.*.attn[12].to_[qkv].weight", "hidden"),
    ("transformer_blocks.*.attn[12].to_out.0.weight", "hidden"),
    ("transformer_blocks.*.ff.net.0.proj.weight", "hidden"),
    ("transformer_blocks.*.ff.net.2.weight", "hidden"),
)
BASIC_QUERIES = (("*.attn[12].to_q.*",),)
BASIC_BRANCHES = ("*.attn[12].to_out.0.*", "transformer_blocks.*.ff.net.2.*")
_ROLES = Structure(
    roles=(
        ("pos_embed.proj.weight", "input"),
        ("*.timestep_embedder.linear_1.weight", "input"),
        ("*.timestep_embedder.linear_2.weight", "hidden"),
        # A row is looked up, so its fan-in is 1.
        ("*.class_embedder.embedding_table.weight", "input", 1.0),
        ("proj_out_1.weight", "modulation"),
        ("proj_out_2.weight", "output"),
        ("proj_out_2.bias", "finite"),
        ("transformer_blocks.*.norm1.linear.weight", "modulation"),
        *BASIC_BLOCKS,
        ("*.bias", "vector"),
    ),
    queries=BASIC_QUERIES,
    branches=BASIC_BRANCHES,
    blocks=("transformer_blocks.*",),
)

FAMILY = Family(
    classes=("DiTTransformer2DModel",),
    places=places_of_planes,
    prompt_first=True,  # its pipeline puts the labels before the null labels
    mup=_ROLES,
)
