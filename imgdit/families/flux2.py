"""FLUX.2 of diffusers, dev and klein: four-axis rotations, one modulation for all blocks of a kind, no pooled text.

B batch, N image tokens, T text tokens, S all tokens, C channels of a token, D width, F frames, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.attention.grouped import grouped_attention
from imgdit.families.mmdit import ADDED_QKV, QKV
from imgdit.families.step import (
    Step,
    call_of_tokens,
    double_and_single,
    embed_tokens,
    known_vector,
    own_positions,
    places_of_ids,
    read_image,
    references_in_ids,
    sigma_of_timestep,
    training_arguments,
    training_ids,
)
from imgdit.family import (
    Arguments,
    Conditions,
    Family,
    LoraNames,
    NoisyImages,
    Preset,
    PromptEncoding,
    TokenFormat,
    Training,
    timestep_times,
)
from imgdit.frames import Frame
from imgdit.lora.rows import AdapterRows, linear
from imgdit.models.blocks import BlockPlan, attend
from imgdit.models.functional import PATCH, apply_rope, gated_add, in_range, modulate, pack, rope_table
from imgdit.mup.structure import Structure


def encode_normalised(model: Any, vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Tokens normalised by the running statistics of the autoencoder's BatchNorm, as FLUX.2 and FLUX.3 have them."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return normalised(vae, pack(latents.float(), PATCH))


def normalised(vae: Any, tokens: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    """Tokens (B, n, C) by the running statistics of the autoencoder's BatchNorm.

    Args:
        eps: added to the variance; `None`: the autoencoder's.
    """
    deviation = torch.sqrt(vae.bn.running_var.float() + (vae.config.batch_norm_eps if eps is None else eps))
    return (tokens - vae.bn.running_mean.float()) / deviation


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    text, image = own_positions(arguments)
    if kept is not None:
        image = image[kept.to(image.device)]
    riders = [F.pad(frame.ids(), (0, 1)).to(image.device) for frame in conditions]
    ids = torch.cat([text.float(), image.float(), *riders])
    return rope_table(ids, model.config.axes_dims_rope, model.config.rope_theta)


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
    guidance = arguments.get("guidance")
    timestep = arguments["timestep"].to(dtype) * 1000
    guidance = None if guidance is None else guidance.to(dtype) * 1000
    if frame.sigma is not None:
        timestep = torch.full_like(timestep, frame.sigma * 1000)
        guidance = None if guidance is None else torch.full_like(guidance, 1000.0 * (frame.guidance or 1.0))
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


def _known_modulation(stream: str, step: Step, module: Any, original: Callable, vector: torch.Tensor) -> torch.Tensor:
    """Of a shared modulation: that of the image or of the text (B, 6D or 3D), which is computed already."""
    return getattr(step.shared, stream)[:, 0]


def _double_block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image (B, T, D) and (B, N, D) of a `Flux2TransformerBlock`."""
    image, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    frames, texts = plan.frame_lengths, plan.text_lengths
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = step.shared.image.chunk(6, dim=-1)
    shift_t, scale_t, gate_t, shift_mlp_t, scale_mlp_t, gate_mlp_t = step.shared.text.chunk(6, dim=-1)

    attended, attended_t = attend(
        block.attn,
        modulate(block.norm1(image), shift, scale, frames),
        modulate(block.norm1_context(text), shift_t, scale_t, texts),
        step.rope,
        plan=plan,
        cache=cache,
    )
    image = gated_add(image, gate, attended, frames)
    normed = modulate(block.norm2(image), shift_mlp, scale_mlp, frames)
    image = gated_add(image, gate_mlp, fused_feed_forward(block.ff, normed, plan.adapters("image")), frames)

    text = gated_add(text, gate_t, attended_t, texts)
    normed = modulate(block.norm2_context(text), shift_mlp_t, scale_mlp_t, texts)
    text = gated_add(text, gate_mlp_t, fused_feed_forward(block.ff_context, normed, plan.adapters("text")), texts)
    return in_range(text), image


def fused_feed_forward(module: Any, x: torch.Tensor, rows: AdapterRows | None) -> torch.Tensor:
    """SwiGLU whose gate and value come from one layer, with adapters on rows."""
    if rows is None:
        return module(x)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return linear(module.linear_out, module.act_fn(linear(module.linear_in, x, rows)), rows)

    return compat.called(module, compute, x)


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
    query = apply_rope(attn.norm_q(query), image_rotary_emb[: query.shape[1]])
    key = apply_rope(attn.norm_k(key), image_rotary_emb)
    cached = None if cache is None else cache.exchange("attn", key, value, plan.frozen)
    attended = grouped_attention(
        query,
        key,
        value,
        plan.groups,
        key_mask=plan.key_mask,
        cached=cached,
        packed=plan.packed,
        backend=compat.processor_backend(attn),
    )
    attended = attended.flatten(2).to(query.dtype)
    return linear(attn.to_out, torch.cat([attended, attn.mlp_act_fn(mlp[:, :read])], dim=-1), rows)


# Names of FLUX.2's repository.
_DOUBLE = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_ROOT = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

_ROLES = Structure(
    roles=(
        ("x_embedder.weight", "input"),
        ("context_embedder.weight", "input"),
        ("time_guidance_embed.*_embedder.linear_1.weight", "input"),
        ("time_guidance_embed.*_embedder.linear_2.weight", "hidden"),
        ("proj_out.weight", "output"),
        ("*.norm_q.weight", "head"),
        ("*.norm_k.weight", "head"),
        ("*.norm_added_q.weight", "head"),
        ("*.norm_added_k.weight", "head"),
        ("norm_out.linear.weight", "modulation"),
        ("*_stream_modulation*.linear.weight", "modulation"),
        ("transformer_blocks.*.attn.*.weight", "hidden"),
        ("transformer_blocks.*.ff*.linear_*.weight", "hidden"),
        ("single_transformer_blocks.*.attn.to_*.weight", "hidden"),
    ),
    queries=(("*.norm_q.weight", "*.norm_added_q.weight"),),
    branches=(
        "transformer_blocks.*.attn.to_out.0.*",
        "transformer_blocks.*.attn.to_add_out.*",
        "transformer_blocks.*.ff*.linear_out.*",
        "single_transformer_blocks.*.attn.to_out.*",
    ),
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    depth=("num_layers", "num_single_layers"),
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
    tokens=TokenFormat(
        patch=lambda model, vae: PATCH, channels=lambda model: model.config.in_channels, encode=encode_normalised
    ),
    conditions=Conditions(
        call=call_of_tokens,
        rope=_rope,
        position_arguments=("txt_ids", "img_ids"),
        remade_positions=("img_ids",),  # joined with those of reference images
        vector=_vector,
        shared=_shared,
        blocks=double_and_single(_double_block, _single_block),
        edges=lambda model: {
            "x_embedder": embed_tokens,
            "time_guidance_embed": known_vector,
            "double_stream_modulation_txt": partial(_known_modulation, "text"),
            "double_stream_modulation_img": partial(_known_modulation, "image"),
            "single_stream_modulation": partial(_known_modulation, "joint"),
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
            "double_blocks": ("transformer_blocks", _DOUBLE),
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
