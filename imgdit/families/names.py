"""Names of layers that several classes share: in LoRA files of FLUX's kind, and by their roles for μP."""

from __future__ import annotations

from imgdit.mup.structure import Structure

QKV, ADDED_QKV = (
    tuple(f"attn.{name}" for name in names)
    for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
)
"""Projections of an attention, of the image and of the text, in the order of their rows where they are fused."""


def double_block_names(first: str, last: str) -> dict[str, tuple[str, ...]]:
    """`LoraNames.blocks` of the attention and the MLPs in double-stream blocks, by the names of FLUX's repositories.

    Args:
        first, last: layers of an MLP in diffusers.
    """
    return {
        "img_attn.qkv": QKV,
        "txt_attn.qkv": ADDED_QKV,
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": (f"ff.{first}",),
        "img_mlp.2": (f"ff.{last}",),
        "txt_mlp.0": (f"ff_context.{first}",),
        "txt_mlp.2": (f"ff_context.{last}",),
    }


EDGES: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
}
"""`LoraNames.root` of the layers at both ends, by the names of FLUX's repositories."""
NORM_OUT: dict[str, tuple[str, ...]] = {"final_layer.adaLN_modulation.1": ("norm_out.linear",)}
"""The same of the modulation of the last norm, where it has a layer."""


def embedder_names(module: str, **parts: str) -> dict[str, tuple[str, ...]]:
    """`LoraNames.root` of the two layers of each embedder of a vector, by the names of FLUX's repositories.

    Args:
        module: diffusers' name of the module that holds the embedders.
        parts: diffusers' names of the embedders by those of the repositories: `time="timestep"`.
    """
    return {
        f"{own}_in.{layer}_layer": (f"{module}.{name}_embedder.linear_{number}",)
        for own, name in parts.items()
        for layer, number in (("in", 1), ("out", 2))
    }


ROLES = Structure(
    roles=(
        ("x_embedder.weight", "input"),
        ("pos_embed.proj.weight", "input"),
        ("context_embedder.weight", "input"),
        ("time_text_embed.*_embedder.linear_1.weight", "input"),
        ("time_text_embed.*_embedder.linear_2.weight", "hidden"),
        ("proj_out.weight", "output"),
        ("proj_out.bias", "finite"),
        ("text_proj_out.weight", "output"),
        ("text_proj_out.bias", "finite"),
        ("text_embedder.weight", "input", 1.0),
        ("null_image_embd", "input", 0.02),
        ("alignment_head.*hidden.weight", "hidden"),
        ("alignment_head.to_features.weight", "output"),
        ("alignment_head.to_features.bias", "finite"),
        ("*.norm_q.weight", "head"),
        ("*.norm_k.weight", "head"),
        ("*.norm_added_q.weight", "head"),
        ("*.norm_added_k.weight", "head"),
        ("norm_out.linear.weight", "modulation"),
        ("*transformer_blocks.*.norm*.linear.weight", "modulation"),
        ("*transformer_blocks.*.attn*.to_[qkv].weight", "hidden"),
        ("*transformer_blocks.*.attn*.to_qkv.weight", "hidden"),
        ("*transformer_blocks.*.attn*.to_out.0.weight", "hidden"),
        ("transformer_blocks.*.attn.add_[qkv]_proj.weight", "hidden"),
        ("transformer_blocks.*.attn.to_added_qkv.weight", "hidden"),
        ("transformer_blocks.*.attn.to_add_out.weight", "hidden"),
        ("transformer_blocks.*.ff*.net.0.proj.weight", "hidden"),
        ("transformer_blocks.*.ff*.net.2.weight", "hidden"),
        ("single_transformer_blocks.*.proj_mlp.weight", "hidden"),
        ("single_transformer_blocks.*.proj_out.weight", "hidden"),
        ("*.bias", "vector"),
    ),
    queries=(
        ("*.norm_q.weight", "*.norm_added_q.weight"),
        ("*.attn*.to_q.*", "*.attn*.add_q_proj.*"),
    ),
    branches=(
        "*transformer_blocks.*.attn*.to_out.0.*",
        "transformer_blocks.*.attn.to_add_out.*",
        "transformer_blocks.*.ff*.net.2.*",
        "single_transformer_blocks.*.proj_out.*",
    ),
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    depth=("num_layers", "num_single_layers"),
)
"""Roles of the parameters of FLUX.1 and SD3; classes of their kind add those of their own layers."""
