"""`NextDiT`, the library's backbone of OneDiffusion; it takes frames itself."""

from __future__ import annotations

from imgdit.families.mmdit import places_of_layout, timestep_of_layout
from imgdit.family import Family, PromptEncoding
from imgdit.mup.structure import Structure

# The branches end with an RMS norm, so their size is that norm's gain.
_ROLES = Structure(
    roles=(
        ("x_embedder.weight", "input"),
        ("t_embedder.mlp.0.weight", "input"),
        ("t_embedder.mlp.2.weight", "hidden"),
        ("y_embedder.0.weight", "finite"),
        ("y_embedder.0.bias", "finite"),
        ("y_embedder.1.weight", "input"),
        ("layers.*.attention_y_norm.weight", "finite"),
        ("layers.*.attention.w[kv]_y.weight", "input"),
        ("layers.*.attention.w[qkvo].weight", "hidden"),
        ("layers.*.attention.gate", "heads"),
        ("layers.*.attention.*_norm.weight", "vector"),
        ("layers.*.feed_forward.w[123].weight", "hidden"),
        ("layers.*.attention_norm[12].weight", "vector"),
        ("layers.*.ffn_norm[12].weight", "vector"),
        ("layers.*.adaLN_modulation.1.weight", "modulation"),
        ("final_layer.adaLN_modulation.1.weight", "modulation"),
        ("final_layer.linear.weight", "output"),
        ("final_layer.linear.bias", "finite"),
        ("*.bias", "vector"),
    ),
    queries=(("*.q_norm.*",), ("*.attention.wq.*",)),
    branches=("layers.*.attention_norm2.weight", "layers.*.ffn_norm2.weight"),
    blocks=("layers.*",),
    depth=("depth",),
    width=("hidden_size",),
    heads="num_heads",
    kv_heads="num_kv_heads",
    capped=("t_embedder.*", "y_embedder.1.*", "*adaLN_modulation.1.weight"),
    cap=1024,
)

FAMILY = Family(
    classes=("NextDiT",),
    places=places_of_layout,
    timestep=timestep_of_layout,
    prompts={"OneDiffusionPipeline": PromptEncoding((0, 2, 4))},
    mup=_ROLES,
)
