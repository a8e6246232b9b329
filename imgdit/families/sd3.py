"""SD3 and SD3.5 of diffusers (latents as planes, positions added to the tokens)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersJointAttnProcessor,
)

from imgdit.families.mmdit import SETTINGS
from imgdit.families.names import ADDED_QKV, QKV, ROLES
from imgdit.families.step import (
    Step,
    block_lists,
    call_of_tokens,
    grid_of_planes,
    joint_text_last,
    known_vector,
    packed_tokens,
    places_of_planes,
    read_image,
    with_conditions,
)
from imgdit.family import Arguments, AsMMDiT, Call, Conditions, Family, LoraNames, PromptEncoding
from imgdit.frames import Frame
from imgdit.lora.rows import linear
from imgdit.models.functional import pack, table_positions


def _call(model: Any, arguments: Arguments) -> Call:
    grid = grid_of_planes(arguments["hidden_states"], model.config.patch_size)
    return call_of_tokens(model, arguments)._replace(frames=(Frame(grid),), length=grid[0] * grid[1])


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    timestep = arguments["timestep"]
    if frame.sigma is not None:
        timestep = torch.full_like(timestep, frame.sigma * 1000)
    return model.time_text_embed(timestep, arguments["pooled_projections"])


def _patches(step: Step, module: Any, original: Callable, latents: torch.Tensor) -> torch.Tensor:
    """Of the patch embedding: image and condition tokens with their positions."""
    tokens = with_conditions(step, pack(latents, module.patch_size))
    embedded = linear(module.proj, tokens, step.plan.adapters("image"))
    return embedded + table_positions(module, step.layout).to(embedded)


def _check_config(config: Mapping[str, Any]) -> None:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config.get("caption_projection_dim", width) != width:
        raise ValueError(
            f"caption_projection_dim={config['caption_projection_dim']} differs from the width {width}; "
            "the joint attention of such a model cannot run"
        )


# Names of SD3's repository.
_JOINT = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.attn.qkv": QKV,
    "context_block.attn.qkv": ADDED_QKV,
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_ROOT = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
}

FAMILY = Family(
    classes=("SD3Transformer2DModel",),
    places=places_of_planes,
    tokens=packed_tokens(
        patch=lambda model, vae: model.config.patch_size,
        channels=lambda model: model.config.in_channels * model.config.patch_size**2,
    ),
    conditions=Conditions(
        call=_call,
        vector=_vector,
        blocks=block_lists({"transformer_blocks": joint_text_last}, ("attn", "attn2"), ends=False),
        edges=lambda model: {"pos_embed": _patches, "time_text_embed": known_vector, "norm_out": read_image},
        processors=(JointAttnProcessor2_0, FusedJointAttnProcessor2_0, XFormersJointAttnProcessor),
        sigma=lambda model, arguments: arguments["timestep"].float() / 1000.0,
        transport=("joint_attention_kwargs", "joint_attention_kwargs"),
        residual_arguments=("block_controlnet_hidden_states",),
        spatial=True,
    ),
    lora=LoraNames(
        blocks={"joint_blocks": ("transformer_blocks", _JOINT)},
        root=_ROOT,
        inputs=("pos_embed.proj",),
        scale_first=("norm_out.linear",),
        scale_first_alone=("norm1_context.linear",),
        written=True,
        label="SD3",
        marks=r"joint_blocks[._]|transformer_blocks[._]\d+[._]attn2[._]|^pos_embed[._]proj",
        never=r"^(down|up|mid)_block",
    ),
    prompts={"StableDiffusion3Pipeline": PromptEncoding((0, 2, None), others=("prompt_2", "prompt_3"), length=333)},
    as_mmdit=AsMMDiT(
        fixed={
            "pos_embed_type": "sincos",
            "num_single_layers": 0,
            "guidance_embeds": False,
            "context_pre_only": True,
            "mlp_ratio": 4.0,
            "timestep_scale": 1.0,
        },
        names=(*SETTINGS, "sample_size", "pos_embed_max_size", "dual_attention_layers", "qk_norm"),
        added=lambda model: {"caption_projection_dim": model.inner_dim, "out_channels": model.out_channels},
        check=_check_config,
    ),
    mup=replace(ROLES, depth=("num_layers",)),
)
