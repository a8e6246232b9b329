"""LongCat-Image of diffusers, with its editing model: FLUX.1's blocks, without pooled text; the image's positions
begin behind the text's.

B batch, N image tokens, T text tokens, S all tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_longcat_image import LongCatImageAttnProcessor

from imgdit.families.flux import DOUBLE, MODULATION, RATIOS, SHARES, SINGLE
from imgdit.families.names import EDGES, NORM_OUT, ROLES, embedder_names
from imgdit.families.step import (
    PACKED_TOKENS,
    call_of_tokens,
    double_and_single,
    embed_tokens,
    joint_text_last,
    known_vector,
    own_positions,
    places_of_ids,
    read_image,
    reads_references,
    references_in_ids,
    rope_of_positions,
    sigma_of_timestep,
    single_text_first,
    timestep_of_frame,
    training_arguments,
    training_ids,
)
from imgdit.family import (
    Arguments,
    Conditions,
    Family,
    LoraNames,
    NoisyImages,
    PromptEncoding,
    Training,
    timestep_times,
)
from imgdit.frames import Frame


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    """All positions are counted from the image's corner, which lies behind the text: attention depends on differences
    alone, and cached keys of conditions are the same for prompts of other lengths."""
    text, image = (ids.float() for ids in own_positions(arguments))
    corner = image[0]
    text, image = text.to(corner.device) - corner, image - corner
    riders = [frame.ids() for frame in conditions]
    return rope_of_positions(text, image, riders, kept, model.pos_embed.theta, model.config.axes_dims_rope)


_PROMPT = 512
"""Text tokens that its pipelines pad every prompt to; the image's positions begin there."""


def _training_arguments(model: Any, images: NoisyImages) -> dict[str, Any]:
    length = images.text.shape[1]
    image = training_ids(images)
    return {
        **training_arguments(images),
        "txt_ids": torch.arange(length).to(image)[:, None] * image.new_tensor([0.0, 1.0, 1.0]),
        "img_ids": image + image.new_tensor([1.0, _PROMPT, _PROMPT]),
    }


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    timestep = timestep_of_frame(arguments, frame)
    return model.time_embed(timestep, timestep.dtype)


FAMILY = Family(
    classes=("LongCatImageTransformer2DModel",),
    places=places_of_ids,
    timestep=timestep_times(1000.0),
    joint_parts=r"^single_transformer_blocks$",
    image_places={"LongCatImageTransformerBlock": 1, "LongCatImageSingleTransformerBlock": 1},
    guides_in_batch=False,
    tokens=PACKED_TOKENS,
    conditions=Conditions(
        call=call_of_tokens,
        rope=_rope,
        position_arguments=("txt_ids", "img_ids"),
        vector=_vector,
        blocks=double_and_single(joint_text_last, single_text_first),
        edges=lambda model: {"x_embedder": embed_tokens, "time_embed": known_vector, "norm_out": read_image},
        processors=(LongCatImageAttnProcessor,),
        sigma=sigma_of_timestep,
        references=references_in_ids,
    ),
    lora=LoraNames(
        # ComfyUI calls its layers as FLUX.1's; the model's own repository has diffusers' blocks.
        blocks={
            "double_blocks": ("transformer_blocks", DOUBLE),
            "single_blocks": ("single_transformer_blocks", SINGLE),
        },
        root={**EDGES, **NORM_OUT, **embedder_names("time_embed", time="timestep")},
        inputs=("x_embedder",),
        missing_rows={"proj_mlp": 4},
        scale_first=("norm_out.linear",),
        written=True,
        label="LongCat-Image",
        marks=rf"^time_embed[._]timestep_embedder|{MODULATION}",
        shared=SHARES,
        never=r"[._](text|guidance)_embedder|^(vector|guidance)_in",
        ratios=RATIOS,
    ),
    prompts={"LongCatImagePipeline": PromptEncoding((0, None, None), length=_PROMPT)},
    mup=replace(
        ROLES,
        roles=(
            ("time_embed.timestep_embedder.linear_1.weight", "input"),
            ("time_embed.timestep_embedder.linear_2.weight", "hidden"),
            *ROLES.roles,
        ),
    ),
    training=Training(
        _training_arguments,
        refused={"LongCatImageEditPipeline": reads_references("meituan-longcat/LongCat-Image")},
    ),
)
