"""Krea 2 of diffusers: text and image in one sequence, modulation shared but for a table per block, grouped key heads.

B batch, N image tokens, T text tokens, L layers of the text encoder, S all tokens, C channels of a token, D width,
F frames, H heads, K heads of keys and values, d features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.families.step import (
    PACKED_TOKENS,
    Step,
    block_lists,
    call_of_tokens,
    embed_tokens,
    grid_of_ids,
    known,
    one_image,
    read_image,
    rope_of_positions,
    sigma_of_timestep,
    text_edges,
    training_arguments,
    training_ids,
    with_image,
)
from imgdit.families.streams import Stream, gated_feed_forward
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
from imgdit.lora.rows import linear
from imgdit.models.blocks import BlockPlan, attend_heads
from imgdit.mup.structure import Structure


def _grid(arguments: Arguments) -> Grid:
    return grid_of_ids(arguments["position_ids"][_text_length(arguments) :])


def _text_length(arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _call(model: Any, arguments: Arguments) -> Call:
    mask = arguments.get("encoder_attention_mask")
    key_mask = None if mask is None else with_image(mask.bool(), arguments["hidden_states"].shape[1])
    return call_of_tokens(model, arguments, key_mask)


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    text, image = arguments["position_ids"].tensor_split([_text_length(arguments)])
    riders = [frame.ids() for frame in conditions]
    return rope_of_positions(text, image, riders, kept, model.config.rope_theta, model.config.axes_dims_rope)


def _training_arguments(model: Any, images: NoisyImages) -> dict[str, Any]:
    """The text's positions are zeros."""
    return {
        **training_arguments(images),
        "encoder_hidden_states": images.text.unflatten(-1, (model.config.num_text_layers, -1)),
        "position_ids": F.pad(training_ids(images), (0, 0, images.text.shape[1], 0)),
        "encoder_attention_mask": images.mask,
    }


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    timestep = arguments["timestep"]
    timestep = timestep if frame.sigma is None else torch.full_like(timestep, frame.sigma)
    return model.time_embed(timestep, dtype=arguments["hidden_states"].dtype)[:, 0]


def _shared(model: Any, vectors: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Modulation (B, F, 6D) of the frames, the first one's also the text's, to which each block adds its table."""
    vectors = F.gelu(torch.cat([vectors[:, :1], vectors], dim=1), approximate="tanh")
    return linear(model.time_mod_proj, vectors, plan.adapters("joint_vectors"))[:, 1:]


def _block(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> torch.Tensor:
    """Text, image and conditions in one sequence (B, S, D) of a `Krea2TransformerBlock`."""
    lengths, count = plan.joint_levels
    modulation = step.shared.unflatten(-1, (6, -1)) + block.scale_shift_table  # (B, F, 6, D)
    scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = modulation.unbind(-2)
    joint = Stream(
        arguments["hidden_states"],
        (block.norm1, block.norm2),
        (shift, scale, gate, shift_mlp, scale_mlp, gate_mlp),
        partial(gated_feed_forward, block.ff, ("gate", "up", "down"), rows=plan.adapters("joint")),
        lengths,
        count,
    )
    attend = partial(_attention, block.attn, plan=plan, cache=cache)
    return joint.after(compat.called(block.attn, attend, joint.normed(), image_rotary_emb=step.rope))


def _attention(
    attn: Any,
    hidden_states: torch.Tensor,
    image_rotary_emb: torch.Tensor,
    *,
    plan: BlockPlan,
    cache: LayerCache | None,
) -> torch.Tensor:
    """Attention whose key and value heads serve several query heads: (B, rows that are read, D)."""
    rows, asking = plan.adapters("joint"), hidden_states[:, : plan.read_rows]

    def heads(module: Any, x: torch.Tensor) -> torch.Tensor:
        return linear(module, x, rows).unflatten(-1, (-1, attn.head_dim))

    query, key, value = heads(attn.to_q, asking), heads(attn.to_k, hidden_states), heads(attn.to_v, hidden_states)
    attended = attend_heads(
        attn.norm_q(query),
        attn.norm_k(key),
        value,
        image_rotary_emb,
        plan=plan,
        cache=cache,
        backend=compat.processor_backend(attn),
    )
    gated = attended * torch.sigmoid(linear(attn.to_gate, asking, rows))
    return linear(attn.to_out[0], gated, rows)


# Names of Krea 2's repository.
_BLOCK = {
    **{f"attn.w{one}": (f"attn.to_{one}",) for one in "qkv"},
    "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",),
    **{f"mlp.{name}": (f"ff.{name}",) for name in ("gate", "up", "down")},
}
_ROOT = {
    "first": ("img_in",),
    "tmlp.0": ("time_embed.linear_1",),
    "tmlp.2": ("time_embed.linear_2",),
    "tproj.1": ("time_mod_proj",),
    "txtmlp.1": ("txt_in.linear_1",),
    "txtmlp.3": ("txt_in.linear_2",),
    "txtfusion.projector": ("text_fusion.projector",),
    "last.linear": ("final_layer.linear",),
}

_ROLES = Structure(
    roles=(
        ("img_in.weight", "input"),
        ("time_embed.linear_1.weight", "input"),
        ("time_embed.linear_2.weight", "hidden"),
        ("time_mod_proj.weight", "modulation"),
        ("text_fusion.*", "finite"),
        ("txt_in.norm.weight", "finite"),
        ("txt_in.linear_1.weight", "input"),
        ("txt_in.linear_2.weight", "hidden"),
        ("*scale_shift_table", "input", 0.0),
        ("final_layer.linear.weight", "output"),
        ("final_layer.linear.bias", "finite"),
        ("final_layer.norm.weight", "vector"),
        ("transformer_blocks.*.attn.norm_[qk].weight", "head"),
        ("transformer_blocks.*.norm[12].weight", "vector"),
        ("transformer_blocks.*.attn.to_*.weight", "hidden"),
        ("transformer_blocks.*.ff.*.weight", "hidden"),
        ("*.bias", "vector"),
    ),
    queries=(("transformer_blocks.*.norm_q.weight",),),
    branches=("transformer_blocks.*.attn.to_out.0.*", "transformer_blocks.*.ff.down.*"),
    blocks=("transformer_blocks.*",),
    kv_heads="num_key_value_heads",
    less_one=("*norm*.weight",),
)

FAMILY = Family(
    classes=("Krea2Transformer2DModel",),
    places=lambda model, arguments: one_image(_grid(arguments)),
    timestep=timestep_times(1000.0),
    text_length=lambda model, arguments: _text_length(arguments),
    text_parts=r"^(txt_in|text_fusion)$",
    joint_parts=r"^transformer_blocks$",
    guides_in_batch=False,
    guides_by_second_call=True,
    tokens=PACKED_TOKENS,
    conditions=Conditions(
        call=_call,
        rope=_rope,
        position_arguments=("position_ids",),
        vector=_vector,
        shared=_shared,
        blocks=block_lists({"transformer_blocks": _block}),
        edges=lambda model: {
            "img_in": embed_tokens,
            "time_embed": known(lambda step: step.image_vector),
            "time_mod_proj": known(lambda step: step.shared[:, :1]),
            "final_layer": read_image,
            **text_edges(model, ["text_fusion", "txt_in"]),
        },
        processors=(Krea2AttnProcessor,),
        sigma=sigma_of_timestep,
    ),
    prompts={"Krea2Pipeline": PromptEncoding((0, None, 1))},
    lora=LoraNames(
        blocks={
            "blocks": ("transformer_blocks", _BLOCK),
            "txtfusion.layerwise_blocks": ("text_fusion.layerwise_blocks", _BLOCK),
            "txtfusion.refiner_blocks": ("text_fusion.refiner_blocks", _BLOCK),
        },
        root=_ROOT,
        inputs=("img_in",),
        written=True,
        label="Krea 2",
        marks=(
            r"attn[._]to_gate|transformer_blocks[._]\d+[._]ff[._](gate|up|down)|te?xt_?fusion|time_mod_proj"
            r"|^blocks[._]\d+[._](attn[._](w[qkvo]|gate)|mlp[._](gate|up|down))"
        ),
        targets=(r"img_in|time_mod_proj|transformer_blocks\.\d+\.(attn\.to_([qkv]|gate|out\.0)|ff\.down)",),
        presets=(
            Preset(
                "Identity Edit",
                "",
                {"index": 1.0, "level": "image", "acts_on": "all", "position": "centred"},
                header=r"identity[ _-]?edit|krea2[ _-]edit",
            ),
            Preset(
                "edit LoRA (ai-toolkit, ComfyUI)",
                r"(^|\.)(blocks\.\d+\.attn\.w[qkvo]|transformer_blocks\.\d+\.attn)",
                {"index": 1.0, "level": "clean", "acts_on": "all"},
            ),
        ),
    ),
    mup=_ROLES,
    training=Training(
        _training_arguments, text_width=lambda model: model.config.num_text_layers * model.config.text_hidden_dim
    ),
)
