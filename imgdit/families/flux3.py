"""FLUX.3 of diffusers: activations and roles of parameters.

Reference images are a stream of their own, with blocks, modulation and noise level 0; they are the model's conditions,
and it takes no others.
"""

from __future__ import annotations

from imgdit.families.step import grid_of_ids, one_image
from imgdit.family import Family, LoraNames, timestep_times
from imgdit.mup.structure import Structure

FAMILY = Family(
    classes=("Flux3Transformer2DModel",),
    # Pipelines halve the coordinates of images.
    places=lambda model, arguments: one_image(grid_of_ids(arguments["img_ids"].float() * 2)),
    timestep=timestep_times(1000.0),
    # Modules of the reference images' stream are read as the text's are: whole.
    text_parts=r"^txt|^context_embedder$|^image_cond$",
    joint_parts=r"^single_transformer_blocks$",
    image_places={"Flux3SingleTransformerBlock": 1},
    guides_in_batch=False,
    guides_by_second_call=True,
    lora=LoraNames(
        label="FLUX.3",
        marks=r"_mode_blocks[._]|x_embedders[._]",
        shares=r"single_transformer_blocks[._]\d+[._]ff[._]linear",
    ),
    mup=Structure(
        roles=(
            ("x_embedders.*.weight", "input"),
            ("context_embedder.weight", "input"),
            ("*timestep_embedder.linear_1.weight", "input"),
            ("*timestep_embedder.linear_2.weight", "hidden"),
            ("*_stream_modulations.*.linear.weight", "modulation"),
            ("norm_out.linear.weight", "modulation"),
            ("proj_out.weight", "output"),
            ("*.attn.norm_[qk].weight", "head"),
            ("*_blocks.*.attn.to_*.weight", "hidden"),
            ("*_blocks.*.ff.linear_*.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("*_blocks.*.attn.to_out.0.*", "*_blocks.*.ff.linear_out.*"),
        blocks=("*_blocks.*",),
        depth=("num_layers", "num_single_layers"),
    ),
)
