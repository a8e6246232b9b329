"""Qwen-Image of diffusers with its editing and layered models: padded text, positions around the image's middle,
reference images at the image's noise level or at 0.

B batch, N image tokens, T text tokens, S all tokens, D width, F frames, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from imgdit.attention.cache import LayerCache
from imgdit.families.names import ADDED_QKV, QKV, ROLES
from imgdit.families.step import (
    PACKED_TOKENS,
    Step,
    block_lists,
    call_of_tokens,
    compute_dtype,
    embed_tokens,
    read_image,
    reads_references,
    sigma_of_timestep,
    training_arguments,
    with_image,
)
from imgdit.families.streams import Stream, double_stream
from imgdit.family import (
    Arguments,
    Call,
    Conditions,
    Family,
    Grid,
    LoraNames,
    NoisyImages,
    Preset,
    PromptEncoding,
    Training,
    timestep_times,
)
from imgdit.frames import Frame
from imgdit.lora.rows import AdapterRows, feed_forward, linear
from imgdit.models.blocks import BlockPlan
from imgdit.models.functional import in_range, rope_table


def _shapes(arguments: Arguments) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of each image of a sample; of a ControlNet's pipeline, which has one, it alone."""
    first = arguments["img_shapes"][0]
    return list(first) if isinstance(first, list) else [first]


def _generated(model: Any, arguments: Arguments) -> int:
    """Images that are generated: one, or all layers, behind which the layered model has the image that it takes
    apart."""
    return len(_shapes(arguments)) - 1 if model.config.use_layer3d_rope else 1


def _places(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...]:
    places, start = [], 0
    for frames, rows, columns in _shapes(arguments)[: _generated(model, arguments)]:
        stop = start + frames * rows * columns
        places.append((slice(start, stop), (frames * rows, columns)))
        start = stop
    return tuple(places)


def _references(model: Any, arguments: Arguments) -> tuple[Frame, ...]:
    """At noise level 0 where the model was trained so (Qwen-Image-Edit 2511), else at the image's."""
    sigma = 0.0 if model.zero_cond_t else None
    shapes = _shapes(arguments)[_generated(model, arguments) :]
    return tuple(Frame((frames * rows, columns), sigma=sigma) for frames, rows, columns in shapes)


def _call(model: Any, arguments: Arguments) -> Call:
    """All that is generated is one frame."""
    references, columns = _references(model, arguments), _shapes(arguments)[0][2]
    mask = arguments.get("encoder_hidden_states_mask")
    call = call_of_tokens(model, arguments)
    length = call.length - sum(frame.length for frame in references)
    return call._replace(
        frames=(Frame((length // columns, columns)), *references),
        key_mask=None if mask is None else with_image(mask.bool(), call.length),
    )


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    """The image's middle is at 0; text stands behind the largest image of the pipeline's own on all axes."""
    device, text = arguments["hidden_states"].device, arguments["encoder_hidden_states"].shape[1]
    image, text = model.pos_embed(arguments["img_shapes"], max_txt_seq_len=text, device=device)
    if kept is not None:
        image = image[kept.to(device)]
    _, rows, columns = _shapes(arguments)[0]
    corner = torch.tensor([0.0, -(rows - rows // 2), -(columns - columns // 2)])
    riders = [
        rope_table((frame.ids() + corner).to(device), model.config.axes_dims_rope, model.pos_embed.theta)
        for frame in conditions
    ]
    return torch.cat([text, image, *riders])


def _training_arguments(model: Any, images: NoisyImages) -> dict[str, Any]:
    return {
        **training_arguments(images),
        "encoder_hidden_states_mask": images.mask,
        "img_shapes": [[(1, *images.grid)]] * len(images.tokens),
        "guidance": images.guidance,
    }


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    latents = arguments["hidden_states"]
    dtype = compute_dtype(latents)
    timestep = arguments["timestep"].to(dtype)
    if frame.sigma is not None:
        timestep = torch.full_like(timestep, frame.sigma)
    return model.time_text_embed(timestep, latents.to(dtype), arguments.get("additional_t_cond"))


def _known_vectors(step: Step, module: Any, original: Callable, timestep: torch.Tensor, *args: Any) -> torch.Tensor:
    """Of the embedding of the timestep: the image's vector (B, D); twice where the model asks for that at 0 too, which
    the blocks have from the plan."""
    known = step.image_vector[:, 0]
    return known.repeat(len(timestep) // len(known), 1)


def _block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image (B, T, D) and (B, N, D) of a `QwenImageTransformerBlock`."""
    image = Stream(
        arguments["hidden_states"],
        (block.img_norm1, block.img_norm2),
        _modulation(block.img_mod, step.shared, plan.adapters("image_vectors")),
        partial(feed_forward, block.img_mlp, rows=plan.adapters("image"), shared=False),
        plan.frame_lengths,
    )
    text = Stream(
        arguments["encoder_hidden_states"],
        (block.txt_norm1, block.txt_norm2),
        _modulation(block.txt_mod, step.shared[:, :1], plan.adapters("text_vectors")),
        partial(feed_forward, block.txt_mlp, rows=plan.adapters("text")),
        plan.text_lengths,
    )
    done_text, done = double_stream(block.attn, image, text, step.rope, plan, cache)
    return in_range(done_text), in_range(done)


def _modulation(module: Any, vectors: torch.Tensor, rows: AdapterRows | None) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate (B, F, D) of attention and MLP."""
    activation, project = module
    return linear(project, activation(vectors), rows).chunk(6, dim=-1)


_ROOT = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)
_LAYERS = (
    *QKV,
    *ADDED_QKV,
    *("attn.to_out.0", "attn.to_add_out", "img_mod.1", "txt_mod.1"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)

_ROLES = replace(
    ROLES,
    roles=(
        ("img_in.weight", "input"),
        ("txt_in.weight", "input"),
        ("txt_norm.weight", "finite"),
        ("time_text_embed.addition_t_embedding.weight", "input"),
        ("transformer_blocks.*_mod.1.weight", "modulation"),
        ("transformer_blocks.*_mlp.net.*.weight", "hidden"),
        *ROLES.roles,
    ),
    branches=(
        "transformer_blocks.*.attn.to_out.0.*",
        "transformer_blocks.*.attn.to_add_out.*",
        "transformer_blocks.*_mlp.net.2.*",
    ),
    depth=("num_layers",),
)

FAMILY = Family(
    classes=("QwenImageTransformer2DModel",),
    places=_places,
    timestep=timestep_times(1000.0),
    text_parts=r"^txt_|^add_|^to_add_out$|_added_",
    guides_in_batch=False,
    tokens=PACKED_TOKENS,
    conditions=Conditions(
        call=_call,
        rope=_rope,
        position_arguments=("img_shapes",),
        vector=_vector,
        blocks=block_lists({"transformer_blocks": _block}, ends=False),
        edges=lambda model: {"img_in": embed_tokens, "time_text_embed": _known_vectors, "norm_out": read_image},
        processors=(QwenDoubleStreamAttnProcessor2_0,),
        sigma=sigma_of_timestep,
        transport=("attention_kwargs", "joint_attention_kwargs"),
        residual_arguments=("controlnet_block_samples",),
        references=_references,
    ),
    lora=LoraNames(
        root={name: (name,) for name in _ROOT},
        layers=_LAYERS,
        inputs=("img_in",),
        written=True,
        label="Qwen-Image",
        marks=r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)",
        never=r"img_mlp[._](proj|gate_layer|out)$",
        targets=(r"img_in|transformer_blocks\.\d+\.(img_mod\.1|attn\.to_[qkv]|attn\.to_out\.0|img_mlp\.net\.2)",),
        presets=(
            Preset(
                "Qwen-Image-In-Context-Control-Union",
                r"^transformer_blocks\..*\.lora_[AB]\.default\.weight$",
                {"index": 1.0, "level": "image", "acts_on": "all", "prompt_prefix": "Context_Control. "},
            ),
        ),
    ),
    prompts={"QwenImagePipeline": PromptEncoding((0, None, 1), length=1024)},
    mup=_ROLES,
    training=Training(
        _training_arguments,
        refused=dict.fromkeys(
            ("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"),
            reads_references("Qwen/Qwen-Image"),
        ),
    ),
)
