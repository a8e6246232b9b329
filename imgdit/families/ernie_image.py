"""ERNIE-Image of diffusers: activations and roles of parameters.

Its blocks work on sequences (S, B, D), the image before the text; conditions have no functions for such blocks.
"""

from __future__ import annotations

from imgdit.families.step import places_of_planes
from imgdit.family import Family, LoraNames
from imgdit.mup.structure import Structure

_SEQUENCE = r"^(layers|final_norm|final_linear)$"

FAMILY = Family(
    classes=("ErnieImageTransformer2DModel",),
    places=places_of_planes,
    text_length=lambda model, arguments: arguments["text_bth"].shape[1],
    text_parts=r"^text_proj$",
    joint_parts=_SEQUENCE,
    image_first=True,
    sequence_first=_SEQUENCE,
    lora=LoraNames(
        label="ERNIE-Image",
        marks=r"layers[._]\d+[._]self_attention[._]",
    ),
    mup=Structure(
        roles=(
            ("x_embedder.proj.weight", "input"),
            ("text_proj.weight", "input"),
            ("time_embedding.linear_*.weight", "hidden"),
            ("adaLN_modulation.1.weight", "modulation"),
            ("final_norm.linear.weight", "modulation"),
            ("final_linear.weight", "output"),
            ("final_linear.bias", "finite"),
            ("layers.*.adaLN_*_ln.weight", "vector"),
            ("layers.*.self_attention.norm_[qk].weight", "head"),
            ("layers.*.self_attention.to_*.weight", "hidden"),
            ("layers.*.mlp.*.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("layers.*.self_attention.to_out.0.*", "layers.*.mlp.linear_fc2.*"),
        blocks=("layers.*",),
        width=("hidden_size",),
    ),
)
