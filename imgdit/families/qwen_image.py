"""Qwen-Image of diffusers with its editing and layered models: padded text, positions around the image's middle,
reference images at the image's noise level or at 0.

B batch, N image tokens, T text tokens, S all tokens, D width, F frames, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from imgdit.attention.cache import LayerCache
from imgdit.families.mmdit import ADDED_QKV, QKV
from imgdit.families.step import (
    PACKED_TOKENS,
    Step,
    compute_dtype,
    embed_tokens,
    read_image,
    reads_references,
    sigma_of_timestep,
    training_arguments,
)
from imgdit.family import (
    Arguments,
    Block,
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
from imgdit.models.blocks import BlockPlan, attend
from imgdit.models.functional import gated_add, in_range, modulate, rope_table
from imgdit.mup.structure import Structure


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
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    references, columns = _references(model, arguments), _shapes(arguments)[0][2]
    length = latents.shape[1] - sum(frame.length for frame in references)
    mask = arguments.get("encoder_hidden_states_mask")
    return Call(
        frames=(Frame((length // columns, columns)), *references),
        text_length=text.shape[1],
        length=latents.shape[1],
        latents=latents,
        texts=(text,),
        cached_by=latents.new_empty(len(latents), 0),
        key_mask=None if mask is None else F.pad(mask.bool(), (0, latents.shape[1]), value=True),
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
    assert step.vectors is not None
    known = step.vectors[:, 0]
    return known.repeat(len(timestep) // len(known), 1)


def _block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image (B, T, D) and (B, N, D) of a `QwenImageTransformerBlock`."""
    image, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    frames, texts = plan.frame_lengths, plan.text_lengths
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(
        block.img_mod, step.shared, plan.adapters("image_vectors")
    )
    shift_t, scale_t, gate_t, shift_mlp_t, scale_mlp_t, gate_mlp_t = _modulation(
        block.txt_mod, step.shared[:, :1], plan.adapters("text_vectors")
    )
    attended, attended_t = attend(
        block.attn,
        modulate(block.img_norm1(image), shift, scale, frames),
        modulate(block.txt_norm1(text), shift_t, scale_t, texts),
        step.rope,
        plan=plan,
        cache=cache,
    )
    image = gated_add(image, gate, attended, frames)
    normed = modulate(block.img_norm2(image), shift_mlp, scale_mlp, frames)
    update = feed_forward(block.img_mlp, normed, plan.adapters("image"), shared=False)
    image = gated_add(image, gate_mlp, update, frames)

    text = gated_add(text, gate_t, attended_t, texts)
    normed = modulate(block.txt_norm2(text), shift_mlp_t, scale_mlp_t, texts)
    text = gated_add(text, gate_mlp_t, feed_forward(block.txt_mlp, normed, plan.adapters("text")), texts)
    return in_range(text), in_range(image)


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

_ROLES = Structure(
    roles=(
        ("img_in.weight", "input"),
        ("txt_in.weight", "input"),
        ("txt_norm.weight", "finite"),
        ("time_text_embed.timestep_embedder.linear_1.weight", "input"),
        ("time_text_embed.timestep_embedder.linear_2.weight", "hidden"),
        ("time_text_embed.addition_t_embedding.weight", "input"),
        ("proj_out.weight", "output"),
        ("proj_out.bias", "finite"),
        ("*.norm_q.weight", "head"),
        ("*.norm_k.weight", "head"),
        ("*.norm_added_q.weight", "head"),
        ("*.norm_added_k.weight", "head"),
        ("norm_out.linear.weight", "modulation"),
        ("transformer_blocks.*_mod.1.weight", "modulation"),
        ("transformer_blocks.*.attn.*.weight", "hidden"),
        ("transformer_blocks.*_mlp.net.*.weight", "hidden"),
        ("*.bias", "vector"),
    ),
    queries=(("*.norm_q.weight", "*.norm_added_q.weight"),),
    branches=(
        "transformer_blocks.*.attn.to_out.0.*",
        "transformer_blocks.*.attn.to_add_out.*",
        "transformer_blocks.*_mlp.net.2.*",
    ),
    blocks=("transformer_blocks.*",),
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
        blocks=lambda model: (
            Block(f"transformer_blocks.{i}", block, _block) for i, block in enumerate(model.transformer_blocks)
        ),
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
