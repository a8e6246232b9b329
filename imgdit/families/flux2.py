"""FLUX.2 of diffusers, dev and klein: four-axis rotations, one modulation for all blocks of a kind, no pooled text.

B batch, N image tokens, T text tokens, S all tokens, C channels of a token, D width, F frames, d features of a head.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.families.names import EDGES, NORM_OUT, ROLES, double_block_names, embedder_names
from imgdit.families.step import (
    NORMALISED_TOKENS,
    Step,
    call_of_tokens,
    double_and_single,
    embed_tokens,
    guidance_of_frame,
    known,
    known_vector,
    places_of_ids,
    read_image,
    references_in_ids,
    rope_of_ids,
    sigma_of_timestep,
    timestep_of_frame,
    training_arguments,
    training_ids,
)
from imgdit.families.streams import Stream, double_stream, fused_feed_forward
from imgdit.family import (
    Arguments,
    Conditions,
    Family,
    LoraNames,
    NoisyImages,
    Preset,
    PromptEncoding,
    Training,
    timestep_times,
)
from imgdit.frames import Frame
from imgdit.lora.rows import linear
from imgdit.models.blocks import BlockPlan, attend_heads
from imgdit.models.functional import gated_add, in_range, modulate


def _training_arguments(model: Any, images: NoisyImages) -> dict[str, Any]:
    batch, length = images.text.shape[:2]
    text = F.pad(torch.arange(length, device=images.text.device)[:, None], (3, 0))
    image = F.pad(training_ids(images).long(), (0, 1))
    return {
        **training_arguments(images),
        "txt_ids": text.expand(batch, -1, -1),
        "img_ids": image.expand(batch, -1, -1),
        "guidance": images.guidance,
    }


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    """The model multiplies timestep and guidance by 1000 in the type of the latents."""
    dtype = arguments["hidden_states"].dtype
    timestep, guidance = (of(arguments, frame, dtype) for of in (timestep_of_frame, guidance_of_frame))
    return model.time_guidance_embed(timestep, guidance)


class _Modulation(NamedTuple):
    """Shift, scale and gate of all blocks of a kind, side by side."""

    text: torch.Tensor
    """(B, 1, 6D) of the double-stream blocks."""
    image: torch.Tensor
    """(B, F, 6D) of the double-stream blocks."""
    joint: torch.Tensor
    """(B, F, 3D) of the single-stream blocks; the first frame's is the text's too."""


def _shared(model: Any, vectors: torch.Tensor, plan: BlockPlan) -> _Modulation:
    text = vectors[:, :1]

    def project(module: Any, vectors: torch.Tensor, rows: str) -> torch.Tensor:
        return linear(module.linear, module.act_fn(vectors), plan.adapters(rows))

    return _Modulation(
        project(model.double_stream_modulation_txt, text, "text_vectors"),
        project(model.double_stream_modulation_img, vectors, "image_vectors"),
        project(model.single_stream_modulation, torch.cat([text, vectors], dim=1), "joint_vectors")[:, 1:],
    )


def _double_block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image (B, T, D) and (B, N, D) of a `Flux2TransformerBlock`."""
    image = Stream(
        arguments["hidden_states"],
        (block.norm1, block.norm2),
        step.shared.image.chunk(6, dim=-1),
        partial(fused_feed_forward, block.ff, rows=plan.adapters("image")),
        plan.frame_lengths,
    )
    text = Stream(
        arguments["encoder_hidden_states"],
        (block.norm1_context, block.norm2_context),
        step.shared.text.chunk(6, dim=-1),
        partial(fused_feed_forward, block.ff_context, rows=plan.adapters("text")),
        plan.text_lengths,
    )
    done_text, done = double_stream(block.attn, image, text, step.rope, plan, cache)
    return in_range(done_text), done


def _single_block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> torch.Tensor:
    """Text and image in one sequence (B, S, D) of a `Flux2SingleTransformerBlock`."""
    joint = arguments["hidden_states"]
    lengths, count = plan.joint_levels
    shift, scale, gate = step.shared.joint.chunk(3, dim=-1)
    update = compat.called(
        block.attn,
        partial(_parallel_attention, block.attn, plan=plan, cache=cache),
        hidden_states=modulate(block.norm(joint), shift, scale, lengths),
        image_rotary_emb=step.rope,
    )
    done = gated_add(joint[:, : plan.read_rows], gate[:, :count], update, lengths[:count])
    return in_range(done if plan.read is None else torch.cat([done, joint[:, plan.read_rows :]], dim=1))


def _parallel_attention(
    attn: Any,
    hidden_states: torch.Tensor,
    image_rotary_emb: torch.Tensor,
    *,
    plan: BlockPlan,
    cache: LayerCache | None,
) -> torch.Tensor:
    """Attention and MLP of a single-stream block, whose projections are fused: (B, rows that are read, D)."""
    rows, read = plan.adapters("joint"), plan.read_rows
    width = attn.inner_dim
    query, key, value, mlp = linear(attn.to_qkv_mlp_proj, hidden_states, rows).split(
        [width, width, width, attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1
    )
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query[:, :read], key, value))
    attended = attend_heads(
        attn.norm_q(query),
        attn.norm_k(key),
        value,
        image_rotary_emb,
        plan=plan,
        cache=cache,
        backend=compat.processor_backend(attn),
    )
    return linear(attn.to_out, torch.cat([attended, attn.mlp_act_fn(mlp[:, :read])], dim=-1), rows)


# Names of FLUX.2's repository.
_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_ROOT = {
    **EDGES,
    **NORM_OUT,
    **embedder_names("time_guidance_embed", time="timestep", guidance="guidance"),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
}

_ROLES = replace(
    ROLES,
    roles=(
        ("time_guidance_embed.*_embedder.linear_1.weight", "input"),
        ("time_guidance_embed.*_embedder.linear_2.weight", "hidden"),
        ("*_stream_modulation*.linear.weight", "modulation"),
        ("transformer_blocks.*.ff*.linear_*.weight", "hidden"),
        ("single_transformer_blocks.*.attn.to_*.weight", "hidden"),
        *ROLES.roles,
    ),
    branches=(
        "transformer_blocks.*.attn.to_out.0.*",
        "transformer_blocks.*.attn.to_add_out.*",
        "transformer_blocks.*.ff*.linear_out.*",
        "single_transformer_blocks.*.attn.to_out.*",
    ),
)

_KEEPS_KEYS = (
    "Flux2KleinKVPipeline keeps the keys and values of its reference images itself, and conditions would be left out "
    "of them. Load the model as a Flux2KleinPipeline"
)

FAMILY = Family(
    classes=("Flux2Transformer2DModel",),
    places=places_of_ids,
    timestep=timestep_times(1000.0),
    joint_parts=r"^single_transformer_blocks$",
    guides_in_batch=False,
    tokens=NORMALISED_TOKENS,
    conditions=Conditions(
        call=call_of_tokens,
        rope=rope_of_ids,
        position_arguments=("txt_ids", "img_ids"),
        remade_positions=("img_ids",),  # joined with those of reference images
        vector=_vector,
        shared=_shared,
        blocks=double_and_single(_double_block, _single_block),
        edges=lambda model: {
            "x_embedder": embed_tokens,
            "time_guidance_embed": known_vector,
            "double_stream_modulation_txt": known(lambda step: step.shared.text[:, 0]),
            "double_stream_modulation_img": known(lambda step: step.shared.image[:, 0]),
            "single_stream_modulation": known(lambda step: step.shared.joint[:, 0]),
            "norm_out": read_image,
        },
        processors=(Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor),
        refused=dict.fromkeys(
            ("Flux2KleinKVPipeline", "Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor"), _KEEPS_KEYS
        ),
        sigma=sigma_of_timestep,
        transport=("joint_attention_kwargs", "joint_attention_kwargs"),
        references=references_in_ids,
    ),
    lora=LoraNames(
        blocks={
            "double_blocks": ("transformer_blocks", double_block_names("linear_in", "linear_out")),
            "single_blocks": ("single_transformer_blocks", _SINGLE),
        },
        root=_ROOT,
        inputs=("x_embedder",),
        scale_first=("norm_out.linear",),
        written=True,
        label="FLUX.2",
        marks=(
            r"to_qkv_mlp_proj|(double|single)_stream_modulation|ff(_context)?[._]linear_(in|out)"
            r"|single_transformer_blocks[._]\d+[._]attn[._]to_out|time_guidance_embed"
        ),
        shared=r"(double|single)_blocks[._]",
        never=r"blocks[._]\d+[._](img_mod|txt_mod|modulation)[._]lin|_mode_blocks[._]|x_embedders[._]",
        ratios={r"linear1$": 9.0, r"linear2$": 1 / 4, r"_mlp[._]0$": 6.0, r"_mlp[._]2$": 1 / 3},
        targets=(
            r"x_embedder|(double_stream_modulation_img|single_stream_modulation)\.linear",
            r"transformer_blocks\.\d+\.(attn\.to_[qkv]|attn\.to_out\.0|ff\.linear_out)",
            r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        ),
        presets=(
            Preset("reference LoRA (refcontrol, klein edit)", "", {"index": 10.0, "level": "image", "acts_on": "all"}),
        ),
    ),
    prompts=dict.fromkeys(("Flux2Pipeline", "Flux2KleinPipeline"), PromptEncoding((0, None, None))),
    mup=_ROLES,
    training=Training(_training_arguments),
)
