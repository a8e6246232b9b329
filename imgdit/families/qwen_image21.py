"""Qwen-Image 2.1 of diffusers: activations and roles of parameters.

Text and reference images come before the generated image in one sequence, at noise level 0 and with keys and values
that the model keeps itself; they are its conditions, and it takes no others.
"""

from __future__ import annotations

from math import prod
from typing import Any

from imgdit.family import Arguments, Family, Grid, timestep_times
from imgdit.mup.structure import Structure


def _references(arguments: Arguments) -> int:
    """Tokens of the reference images."""
    return sum(map(prod, arguments["img_shapes"][0][:-1]))


def _places(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...]:
    """In the image stream the generated image is the last."""
    start, (frames, rows, columns) = _references(arguments), arguments["img_shapes"][0][-1]
    return ((slice(start, start + frames * rows * columns), (frames * rows, columns)),)


def _text_length(model: Any, arguments: Arguments) -> int:
    """Text tokens: the encoder's places but for those of the images, each of which stands for 2 x 2 tokens. Where the
    model reads what comes before the image from its cache, the sequence begins with the image."""
    if arguments.get("kv_cache_mode") == "cached":
        return -_references(arguments)
    return arguments["img_mask"].shape[1] - arguments["hidden_states"].shape[1] // 4


FAMILY = Family(
    classes=("QwenImage21Transformer2DModel",),
    places=_places,
    timestep=timestep_times(1000.0),
    text_length=_text_length,
    text_parts=r"^txt_in$",
    joint_parts=r"^(transformer_blocks|norm_out|proj_out)$",
    guides_in_batch=False,
    mup=Structure(
        roles=(
            ("img_in.weight", "input"),
            ("txt_in.text_norm.weight", "finite"),
            ("txt_in.in_layer.weight", "input"),
            ("txt_in.out_layer.weight", "hidden"),
            ("time_text_embed.timestep_embedder.linear_1.weight", "input"),
            ("time_text_embed.timestep_embedder.linear_2.weight", "hidden"),
            ("modulation.1.weight", "modulation"),
            ("norm_out.linear.weight", "modulation"),
            ("proj_out.weight", "output"),
            ("transformer_blocks.*.attn.norm_[qk].weight", "head"),
            ("transformer_blocks.*.attn.to_*.weight", "hidden"),
            ("transformer_blocks.*.img_mlp.*.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("transformer_blocks.*.attn.to_out.0.*", "transformer_blocks.*.img_mlp.out.*"),
        blocks=("transformer_blocks.*",),
        less_one=("txt_in.text_norm.weight",),
    ),
)
