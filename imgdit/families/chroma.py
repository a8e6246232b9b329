"""Chroma of diffusers: FLUX.1's blocks without projections in their norms, whose shifts, scales and gates are slices
of one table; padded text.

B batch, N image tokens, T text tokens, S all tokens, M vectors of the table, D width, F frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from imgdit.attention.cache import LayerCache
from imgdit.families.flux import DOUBLE, RATIOS, SHARES, SINGLE
from imgdit.families.names import EDGES, ROLES
from imgdit.families.step import (
    PACKED_TOKENS,
    Step,
    call_of_tokens,
    double_and_single,
    embed_tokens,
    places_of_ids,
    read_image,
    rope_of_ids,
    sigma_of_timestep,
    timestep_of_frame,
    training_arguments,
    training_ids,
    with_image,
)
from imgdit.family import (
    Arguments,
    Call,
    Conditions,
    Family,
    LoraNames,
    NoisyImages,
    PromptEncoding,
    Training,
    timestep_times,
)
from imgdit.frames import Frame
from imgdit.models.blocks import BlockPlan, double_block, joint_block


def _call(model: Any, arguments: Arguments) -> Call:
    """Pipelines cast the padding mask to the type of the text, in which the model adds it to the logits: a token sees
    padding e times less, not never. So do the blocks here."""
    return call_of_tokens(model, arguments, key_mask=arguments.get("attention_mask"))


def _training_arguments(model: Any, images: NoisyImages) -> dict[str, Any]:
    """With the mask as pipelines give it, see `_call`."""
    tokens = images.tokens
    return {
        **training_arguments(images),
        "txt_ids": tokens.new_zeros(images.text.shape[1], 3),
        "img_ids": training_ids(images),
        "attention_mask": None if images.mask is None else with_image(images.mask.to(tokens.dtype), tokens.shape[1]),
    }


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    """The table (B, M, D)."""
    return model.distilled_guidance_layer(model.time_text_embed(timestep_of_frame(arguments, frame)))


def _known_table(step: Step, module: Any, original: Callable, *args: Any) -> torch.Tensor:
    """Of the network that computes the table: the tables of all frames (B, M, F, D), of which the model gives each
    block its vectors."""
    assert step.vectors is not None
    return step.vectors.transpose(1, 2)


def _read_image(
    step: Step, module: Any, original: Callable, hidden_states: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Of the last norm, by the image's vectors."""
    return read_image(step, module, original, hidden_states, table[:, :, 0])


def _double_block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image (B, T, D) and (B, N, D) of a `ChromaTransformerBlock`."""
    table = arguments["temb"].transpose(1, 2)  # (B, F, 12, D)
    image, text = double_block(
        block,
        arguments["hidden_states"],
        arguments["encoder_hidden_states"],
        table[:, :, :6],
        table[:, :1, 6:],
        step.rope,
        plan,
        cache,
    )
    return text, image


def _single_block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> torch.Tensor:
    """Text and image in one sequence (B, S, D) of a `ChromaSingleTransformerBlock`."""
    table = arguments["temb"].transpose(1, 2)  # (B, F, 3, D)
    return joint_block(block, arguments["hidden_states"], table, *plan.joint_levels, step.rope, plan, cache)


_ROOT = {
    **EDGES,
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
} | {
    f"distilled_guidance_layer.layers.{i}.{own}_layer": (f"distilled_guidance_layer.layers.{i}.linear_{number}",)
    for i in range(5)
    for own, number in (("in", 1), ("out", 2))
}


FAMILY = Family(
    classes=("ChromaTransformer2DModel",),
    places=places_of_ids,
    timestep=timestep_times(1000.0),
    joint_parts=r"^single_transformer_blocks$",
    image_places={"ChromaTransformerBlock": 1},
    guides_in_batch=False,
    guides_by_second_call=True,
    tokens=PACKED_TOKENS,
    conditions=Conditions(
        call=_call,
        rope=rope_of_ids,
        position_arguments=("txt_ids", "img_ids"),
        vector=_vector,
        blocks=double_and_single(_double_block, _single_block),
        edges=lambda model: {
            "x_embedder": embed_tokens,
            "distilled_guidance_layer": _known_table,
            "norm_out": _read_image,
        },
        processors=(FluxAttnProcessor,),
        sigma=sigma_of_timestep,
        # The model has a dictionary for its blocks, but not under gradient checkpointing.
        residual_arguments=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
    lora=LoraNames(
        blocks={
            "double_blocks": (
                "transformer_blocks",
                {name: parts for name, parts in DOUBLE.items() if "_mod." not in name},
            ),
            "single_blocks": ("single_transformer_blocks", {name: SINGLE[name] for name in ("linear1", "linear2")}),
        },
        root=_ROOT,
        inputs=("x_embedder",),
        missing_rows={"proj_mlp": 4},
        written=True,
        label="Chroma",
        marks=r"distilled_guidance_layer",
        shared=SHARES,
        never=r"^pos_embed[._]|^joint_blocks",
        ratios=RATIOS,
        also=("FLUX.1",),
    ),
    prompts={"ChromaPipeline": PromptEncoding((0, None, 2), keeps_padding=True)},
    mup=replace(
        ROLES,
        roles=(
            ("distilled_guidance_layer.out_proj.weight", "input"),
            ("distilled_guidance_layer.out_proj.bias", "vector"),
            ("distilled_guidance_layer.*", "finite"),
            *ROLES.roles,
        ),
    ),
    training=Training(_training_arguments),
)
