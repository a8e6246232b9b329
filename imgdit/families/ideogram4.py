"""Ideogram 4 of diffusers: text and image in one packed sequence with an indicator, a segment, positions and, if it is
given, a noise level for each token; a second transformer, which reads no text, for guidance.

A condition is what the model calls image tokens at time 1, in the segment of the image. They enter before the first
block and are never among the arguments: their positions may lie between whole numbers.

B batch, L tokens of the model's own (padding, text, image), N image tokens, n condition tokens, S = L + n, C channels
of a token, D width, V width of the conditioning vectors, F frames, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    OUTPUT_IMAGE_INDICATOR,
    Ideogram4AttnProcessor,
)
from peft.tuners.lora import LoraLayer
from torch.utils.weak import WeakIdKeyDictionary

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.families.step import (
    Step,
    entered,
    grid_of_ids,
    known_vector,
    normalised,
    one_image,
    text_edges,
    with_conditions,
)
from imgdit.families.streams import attention_by_halves, gated_between_norms
from imgdit.family import Arguments, Block, Call, Conditions, Family, Grid, LoraNames, TokenFormat
from imgdit.frames import Frame
from imgdit.images.latents import encode_raw
from imgdit.lora.rows import linear, on_rows
from imgdit.models.blocks import BlockPlan
from imgdit.models.functional import PATCH, pack
from imgdit.mup.structure import Structure

_LENGTHS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Image tokens by the indicator of a call, of which a pipeline passes the same object in every step."""


def _image(arguments: Arguments) -> Any:
    """Which tokens (L,) are the image's; it is the last in the sequence."""
    return arguments["indicator"][0] == OUTPUT_IMAGE_INDICATOR


def _image_length(arguments: Arguments) -> int:
    indicator = arguments["indicator"]
    if indicator not in _LENGTHS:
        _LENGTHS[indicator] = int(_image(arguments).sum())
    return _LENGTHS[indicator]


def _text_length(arguments: Arguments) -> int:
    """Tokens before the image: padding and text."""
    return arguments["hidden_states"].shape[1] - _image_length(arguments)


def _places(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...]:
    return one_image(grid_of_ids(arguments["position_ids"][0][_image(arguments)]))


def _time(arguments: Arguments) -> torch.Tensor:
    """(B,) of the image. The model counts from 0, noise, to 1: for the sample, or for each token."""
    times = arguments["timestep"]
    return times if times.ndim == 1 else times[:, -1]


def _encode(model: Any, vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Tokens normalised by the running statistics of the autoencoder's BatchNorm, whose features are ordered (row,
    column, channel) here."""
    latents = encode_raw(vae, pixels, generator).float()  # (B, c, h, w)
    tokens = pack(latents, PATCH).unflatten(-1, (latents.shape[1], -1)).transpose(-1, -2).flatten(-2)
    return normalised(vae, tokens)


def _call(model: Any, arguments: Arguments) -> Call:
    latents, segments = arguments["hidden_states"], arguments["segment_ids"]
    length = _image_length(arguments)
    return Call(
        frames=(Frame((1, length)),),
        text_length=latents.shape[1] - length,
        length=length,
        latents=latents,
        texts=(arguments["encoder_hidden_states"],),
        cached_by=latents.new_empty(len(latents), 0),
        key_mask=segments == segments[:, -1:],  # padding has a segment of its own
    )


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    """(B, S, d): the model's own module rounds the angles of large positions, and conditions are turned as the image
    is."""
    own = arguments["position_ids"].float()  # (B, L, 3)
    riders = [(frame.ids() + IMAGE_POSITION_OFFSET).to(own).expand(len(own), -1, -1) for frame in conditions]
    return torch.complex(*model.rotary_emb(torch.cat([own, *riders], dim=1)))


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    time = _time(arguments)
    return model.t_embedding(time if frame.sigma is None else torch.full_like(time, 1.0 - frame.sigma))


def _shared(model: Any, vectors: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """(B, F, V), before the activation."""
    return linear(model.adaln_proj, vectors, plan.adapters("image_vectors"))


def _pass_arguments(model: Any, arguments: dict[str, Any], step: Step) -> dict[str, Any]:
    """One time for each sample: that of conditions is in the plan."""
    return arguments | {"timestep": _time(arguments)}


# Edges and blocks


def _known_modulation(step: Step, module: Any, original: Callable, vector: torch.Tensor) -> torch.Tensor:
    """Of the projection of the conditioning vector: that of text and image (B, 1, V)."""
    return step.shared[:, :1]


def _embed(step: Step, module: Any, original: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """Of the embedding of tokens: (B, L, D). Condition tokens wait for the first block."""
    length, tokens = tokens.shape[1], with_conditions(step, tokens)
    rows = step.plan.adapters("joint")
    embedded = (
        on_rows(module, tokens, rows) if rows is not None and isinstance(module, LoraLayer) else original(tokens)
    )
    step.waiting["layers"] = embedded[:, length:]
    return embedded[:, :length]


def _indicate(step: Step, module: Any, original: Callable, kinds: torch.Tensor) -> torch.Tensor:
    """Of the embedding of what a token is: (B, L, D). Condition tokens are image tokens."""
    if step.condition_length:
        step.waiting["layers"] = step.waiting["layers"] + original(torch.ones_like(kinds[:, :1]))
    return original(kinds)


def _read(step: Step, module: Any, original: Callable, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of the last layer: (B, L, C)."""
    return original(x[:, : step.layout.text_length + step.image_length], **options)


def _blocks(model: Any) -> Iterator[Block]:
    last = len(model.layers) - 1
    for i, module in enumerate(model.layers):
        yield Block(f"layers.{i}", module, _block, ("attention",), ends_conditions=i == last)


def _block(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> torch.Tensor:
    """Text, image and conditions (B, S, D) of an `Ideogram4TransformerBlock`."""
    x = entered(arguments["hidden_states"], step, step.layout.text_length + step.image_length, "layers")
    modulation = linear(block.adaln_modulation, F.silu(step.shared), plan.adapters("image_vectors"))  # (B, F, 4D)
    compute = partial(_attention, block.attention, plan=plan, cache=cache)

    def attend(normed: torch.Tensor) -> torch.Tensor:
        return compat.called(block.attention, compute, normed, image_rotary_emb=step.rope)

    return gated_between_norms(block, x, modulation, attend, plan)


def _attention(attn: Any, hidden_states: torch.Tensor, image_rotary_emb: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention_by_halves(attn, hidden_states, image_rotary_emb, **options)


# Names of Ideogram's repository.
_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.o": ("attention.to_out.0",),
    **{name: (name,) for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaln_modulation")},
}
_ROOT = (
    *("input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj"),
    *("final_layer.linear", "final_layer.adaln_modulation"),
)

FAMILY = Family(
    classes=("Ideogram4Transformer2DModel",),
    places=_places,
    timestep=lambda model, arguments: 1000.0 * (1.0 - float(_time(arguments)[0])),
    text_length=lambda model, arguments: _text_length(arguments),
    text_parts=r"^llm_cond_",
    joint_parts=r"^(layers|input_proj|embed_image_indicator|final_layer)$",
    guides_in_batch=False,
    tokens=TokenFormat(
        patch=lambda model, vae: PATCH, channels=lambda model: model.config.in_channels, encode=_encode
    ),
    conditions=Conditions(
        call=_call,
        rope=_rope,
        position_arguments=("position_ids", "segment_ids"),
        vector=_vector,
        shared=_shared,
        arguments=_pass_arguments,
        blocks=_blocks,
        edges=lambda model: {
            "input_proj": _embed,
            "embed_image_indicator": _indicate,
            "t_embedding": known_vector,
            "adaln_proj": _known_modulation,
            "final_layer": _read,
            **text_edges(model, ["llm_cond_proj"]),
        },
        processors=(Ideogram4AttnProcessor,),
    ),
    lora=LoraNames(
        blocks={"layers": ("layers", _BLOCK)},
        root={name: (name,) for name in _ROOT},
        inputs=("input_proj",),
        written=True,
        label="Ideogram 4",
        marks=r"adaln_modulation|llm_cond_proj|^input_proj|^layers[._]\d+[._]attention[._]o$",
        shared=r"^layers[._]\d+[._](attention|feed_forward)[._]",
        targets=(
            r"input_proj|adaln_proj|layers\.\d+\.(adaln_modulation|attention\.to_([qkv]|out\.0)|feed_forward\.w2)",
        ),
    ),
    mup=Structure(
        roles=(
            ("input_proj.weight", "input"),
            ("llm_cond_norm.weight", "finite"),
            ("llm_cond_proj.weight", "input"),
            ("embed_image_indicator.weight", "input"),
            ("t_embedding.mlp_*.weight", "hidden"),
            ("adaln_proj.weight", "output"),
            ("adaln_proj.bias", "finite"),
            ("*.adaln_modulation.weight", "input"),
            ("final_layer.linear.weight", "output"),
            ("final_layer.linear.bias", "finite"),
            ("layers.*.attention.norm_[qk].weight", "head"),
            ("layers.*_norm[12].weight", "vector"),
            ("layers.*.attention.to_*.weight", "hidden"),
            ("layers.*.feed_forward.w?.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("layers.*.attention_norm2.weight", "layers.*.ffn_norm2.weight"),
        blocks=("layers.*",),
    ),
)
