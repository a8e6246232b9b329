"""FLUX.1 of diffusers: dev, schnell, Kontext and what is built like them (text first, rotary positions)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from imgdit.families.mmdit import SETTINGS
from imgdit.families.names import ADDED_QKV, EDGES, NORM_OUT, QKV, ROLES, double_block_names, embedder_names
from imgdit.families.step import (
    PACKED_TOKENS,
    call_of_tokens,
    double_and_single,
    embed_tokens,
    guidance_of_frame,
    joint_text_last,
    known_vector,
    own_positions,
    places_of_ids,
    read_image,
    references_in_ids,
    rope_of_ids,
    sigma_of_timestep,
    single_text_first,
    timestep_of_frame,
)
from imgdit.family import (
    Arguments,
    AsMMDiT,
    Call,
    Conditions,
    Family,
    LoraNames,
    PromptEncoding,
    timestep_times,
)
from imgdit.frames import Frame


def _call(model: Any, arguments: Arguments) -> Call:
    """With positions of the whole image, also where a pipeline samples a part of it."""
    _, ids = own_positions(arguments)
    return call_of_tokens(model, arguments)._replace(frames=(Frame((1, len(ids))),))


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    guidance = guidance_of_frame(arguments, frame)
    rest = [] if guidance is None else [guidance]
    return model.time_text_embed(timestep_of_frame(arguments, frame), *rest, arguments["pooled_projections"])


# Names of FLUX's repository.
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    **double_block_names("net.0.proj", "net.2"),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
}
MODULATION = r"blocks[._]\d+[._](img_mod|txt_mod|modulation)[._]lin"
SHARES = r"(double|single)_blocks[._]|single_transformer_blocks[._]"
RATIOS = {r"linear1$": 7.0, r"linear2$": 1 / 5, r"_mlp[._]0$": 4.0, r"_mlp[._]2$": 1 / 4}
# XLabs' names; 1 is the image's stream, 2 the text's.
_XLABS_DOUBLE = {
    "processor.qkv_lora1": QKV,
    "processor.qkv_lora2": ADDED_QKV,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_XLABS_SINGLE = {"processor.qkv_lora": QKV, "processor.proj_lora": ("proj_out",)}

FAMILY = Family(
    classes=("FluxTransformer2DModel",),
    places=places_of_ids,
    timestep=timestep_times(1000.0),
    joint_parts=r"^single_transformer_blocks$",
    guides_in_batch=False,
    tokens=PACKED_TOKENS,
    conditions=Conditions(
        call=_call,
        rope=rope_of_ids,
        position_arguments=("txt_ids", "img_ids"),
        vector=_vector,
        blocks=double_and_single(joint_text_last, single_text_first),
        edges=lambda model: {"x_embedder": embed_tokens, "time_text_embed": known_vector, "norm_out": read_image},
        processors=(FluxAttnProcessor,),
        sigma=sigma_of_timestep,
        transport=("joint_attention_kwargs", "joint_attention_kwargs"),
        residual_arguments=("controlnet_block_samples", "controlnet_single_block_samples"),
        references=references_in_ids,
    ),
    lora=LoraNames(
        blocks={
            "double_blocks": ("transformer_blocks", DOUBLE | _XLABS_DOUBLE),
            "single_blocks": ("single_transformer_blocks", SINGLE | _XLABS_SINGLE),
        },
        root={
            **EDGES,
            **NORM_OUT,
            **embedder_names("time_text_embed", time="timestep", guidance="guidance", vector="text"),
        },
        written=True,
        inputs=("x_embedder",),
        missing_rows={"proj_mlp": 4},
        scale_first=("norm_out.linear",),
        label="FLUX.1",
        marks=rf"{MODULATION}|^vector_in|[._]text_embedder",
        shared=SHARES,
        never=r"^pos_embed[._]|^joint_blocks",
        ratios=RATIOS,
    ),
    prompts={"FluxPipeline": PromptEncoding((0, 1, None), others=("prompt_2",))},
    as_mmdit=AsMMDiT(
        fixed={
            "pos_embed_type": "rope",
            "rope_theta": 10000.0,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (),
            "context_pre_only": False,
            "mlp_ratio": 4.0,
            "timestep_scale": 1000.0,
        },
        names=(*SETTINGS, "num_single_layers", "guidance_embeds", "axes_dims_rope"),
    ),
    mup=ROLES,
)
