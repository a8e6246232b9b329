"""FLUX.1 of diffusers: dev, schnell, Kontext and what is built like them (text first, rotary positions)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from imgdit.families.mmdit import ADDED_QKV, QKV, ROLES, SETTINGS
from imgdit.families.step import (
    PACKED_TOKENS,
    compute_dtype,
    double_and_single,
    embed_tokens,
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
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    pooled = arguments["pooled_projections"]
    _, ids = own_positions(arguments)
    return Call(
        frames=(Frame((1, len(ids))),),
        text_length=text.shape[1],
        length=latents.shape[1],
        latents=latents,
        texts=(pooled, text),
        cached_by=pooled,
    )


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    """The model multiplies timestep and guidance by 1000 in the type in which it computes."""
    dtype, guidance = compute_dtype(arguments["hidden_states"]), arguments.get("guidance")
    timestep = timestep_of_frame(arguments, frame)
    rest = [] if guidance is None else [guidance.to(dtype) * 1000]
    if frame.sigma is not None:
        rest = [torch.full_like(one, 1000.0 * (frame.guidance or 1.0)) for one in rest]
    return model.time_text_embed(timestep, *rest, arguments["pooled_projections"])


# Names of FLUX's repository.
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
}
ROOT = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
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
        root=ROOT,
        written=True,
        inputs=("x_embedder",),
        missing_rows={"proj_mlp": 4},
        scale_first=("norm_out.linear",),
        label="FLUX.1",
        marks=r"blocks[._]\d+[._](img_mod|txt_mod|modulation)[._]lin|^vector_in|[._]text_embedder",
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
