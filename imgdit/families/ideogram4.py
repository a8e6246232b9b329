"""Ideogram 4 of diffusers: activations and roles of parameters.

A packed sequence with an indicator, a segment and positions for each token, all of which the pipeline makes, and a
second transformer for guidance: tokens that nobody announced cannot be added, so it takes no conditions.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_ideogram4 import OUTPUT_IMAGE_INDICATOR

from imgdit.families.step import grid_of_ids, one_image
from imgdit.family import Arguments, Family, Grid, LoraNames
from imgdit.mup.structure import Structure


def _image(arguments: Arguments) -> Any:
    """Which tokens (L,) are the image's; it is the last in the sequence."""
    return arguments["indicator"][0] == OUTPUT_IMAGE_INDICATOR


def _places(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...]:
    return one_image(grid_of_ids(arguments["position_ids"][0][_image(arguments)]))


def _timestep(model: Any, arguments: Arguments) -> float:
    """The model counts from 0, noise, to 1: for the sample, or for each token."""
    times = arguments["timestep"]
    return 1000.0 * (1.0 - float(times[0] if times.ndim == 1 else times[0, -1]))


FAMILY = Family(
    classes=("Ideogram4Transformer2DModel",),
    places=_places,
    timestep=_timestep,
    text_length=lambda model, arguments: arguments["hidden_states"].shape[1] - int(_image(arguments).sum()),
    text_parts=r"^llm_cond_",
    joint_parts=r"^(layers|input_proj|embed_image_indicator|final_layer)$",
    guides_in_batch=False,
    lora=LoraNames(
        label="Ideogram 4",
        marks=r"adaln_modulation|llm_cond_proj|^input_proj",
        shared=r"^layers[._]\d+[._](attention|feed_forward)[._]",
    ),
    mup=Structure(
        roles=(
            ("input_proj.weight", "input"),
            ("llm_cond_norm.weight", "finite"),
            ("llm_cond_proj.weight", "input"),
            ("embed_image_indicator.weight", "input"),
            ("t_embedding.mlp_*.weight", "hidden"),
            ("adaln_proj.weight", "output"),
            ("adaln_proj.bias", "finite"),
            ("*.adaln_modulation.weight", "input"),
            ("final_layer.linear.weight", "output"),
            ("final_layer.linear.bias", "finite"),
            ("layers.*.attention.norm_[qk].weight", "head"),
            ("layers.*_norm[12].weight", "vector"),
            ("layers.*.attention.to_*.weight", "hidden"),
            ("layers.*.feed_forward.w?.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("layers.*.attention_norm2.weight", "layers.*.ffn_norm2.weight"),
        blocks=("layers.*",),
    ),
)
