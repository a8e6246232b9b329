"""ERNIE-Image of diffusers: latents as planes, blocks over sequences (S, B, D) of the image and then the text, one
modulation for all of them.

Its heads are turned as pairs of halves by angles that are repeated for neighbours. That is no rotation: attention
depends on more than differences of positions, and the image's begin behind the text, so keys of conditions belong to
the text's length.

B batch, N image tokens, T text tokens, n condition tokens, S all tokens, C channels of a token, D width, F frames, d
features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_ernie_image import ErnieImageSingleStreamAttnProcessor
from torch.utils.weak import WeakIdKeyDictionary

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.families.step import (
    Step,
    entered,
    grid_of_planes,
    known_vector,
    normalised,
    places_of_planes,
    text_edges,
    with_conditions,
)
from imgdit.families.streams import attention_by_halves
from imgdit.family import Arguments, Block, Call, Conditions, Family, LoraNames, TokenFormat
from imgdit.frames import Frame
from imgdit.images.latents import encode_raw
from imgdit.lora.rows import AdapterRows, linear
from imgdit.models.blocks import BlockPlan
from imgdit.models.functional import PATCH, gated_add, modulate, pack
from imgdit.mup.structure import Structure

_SEQUENCE = r"^(layers|final_norm|final_linear)$"
_EPS = 1e-5
"""What the pipeline adds to the variance of the autoencoder's BatchNorm, whatever its configuration says."""
_LENGTHS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""`_text_lengths` of the tensors that pipelines pass in every step."""


def _encode(model: Any, vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    latents = encode_raw(vae, pixels, generator).float()
    tokens = normalised(vae, pack(latents, PATCH), _EPS)  # (B, rows * columns of 2 x 2 cells, 4c)
    planes = tokens.transpose(1, 2).unflatten(2, (latents.shape[2] // PATCH, -1))
    return pack(planes, model.config.patch_size)


def _text_lengths(arguments: Arguments) -> torch.Tensor:
    """(B, 2) lengths of the texts in digits of base 256, which half precision holds exactly; one object for all steps,
    so that nothing is compared."""
    lengths = arguments["text_lens"]
    if lengths not in _LENGTHS:
        digits = torch.stack([lengths // 256, lengths % 256], dim=1)
        _LENGTHS[lengths] = digits.to(arguments["hidden_states"].dtype)
    return _LENGTHS[lengths]


def _call(model: Any, arguments: Arguments) -> Call:
    latents, text = arguments["hidden_states"], arguments["text_bth"]
    grid, length = grid_of_planes(latents, model.config.patch_size), text.shape[1]
    seen = torch.arange(length, device=latents.device) < arguments["text_lens"][:, None]
    return Call(
        frames=(Frame(grid),),
        text_length=length,
        length=grid[0] * grid[1],
        latents=latents,
        texts=(text,),
        cached_by=_text_lengths(arguments),
        key_mask=F.pad(seen, (grid[0] * grid[1], 0), value=True),  # the image stands before the text
    )


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    """(B, S, d) of image, text and conditions. The image's first coordinate is the length of its text."""
    latents, text = arguments["hidden_states"], arguments["text_bth"].shape[1]
    image = Frame(grid_of_planes(latents, model.config.patch_size)).ids()
    behind = F.pad(arguments["text_lens"].float()[:, None, None], (0, 2))  # (B, 1, 3)
    own, *riders = (ids.to(latents.device) + behind for ids in (image, *(frame.ids() for frame in conditions)))
    words = F.pad(torch.arange(text, device=latents.device, dtype=torch.float32)[:, None], (0, 2))
    angle = model.pos_embed(torch.cat([own, words.expand(len(own), -1, -1), *riders], dim=1))[:, :, 0]
    return torch.complex(angle.cos(), angle.sin())


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    time = arguments["timestep"]
    time = time if frame.sigma is None else torch.full_like(time, frame.sigma * 1000.0)
    return model.time_embedding(model.time_proj(time).to(arguments["hidden_states"].dtype))


def _shared(model: Any, vectors: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Modulation (B, F, 6D) of the frames, the first one's also the text's."""
    activation, project = model.adaLN_modulation
    return linear(project, activation(vectors), plan.adapters("image_vectors"))


# Edges and blocks


def _embed(step: Step, module: Any, original: Callable, latents: torch.Tensor) -> torch.Tensor:
    """Of the embedding of planes: (B, N, D). Condition tokens wait for the first block."""
    tokens = with_conditions(step, pack(latents, module.patch_size))
    embedded = linear(module.proj, tokens, step.plan.adapters("image"))
    step.waiting["layers"] = embedded[:, step.image_length :]
    return embedded[:, : step.image_length].contiguous()


def _known_modulation(step: Step, module: Any, original: Callable, vector: torch.Tensor) -> torch.Tensor:
    """Of the shared modulation: that of image and text (B, 6D)."""
    return step.shared[:, 0]


def _read(step: Step, module: Any, original: Callable, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Of the last norm: image and text (N + T, B, D)."""
    return original(x[: step.image_length + step.layout.text_length], vector)


def _blocks(model: Any) -> Iterator[Block]:
    last = len(model.layers) - 1
    for i, module in enumerate(model.layers):
        yield Block(f"layers.{i}", module, _block, ("self_attention",), ends_conditions=i == last)


def _block(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> torch.Tensor:
    """Image, text and conditions (S, B, D) of an `ErnieImageSharedAdaLNBlock`. Image and text see and are seen alike,
    and no adapter tells them apart: a plan for text before image holds for the model's own order too."""
    own = step.image_length + step.layout.text_length
    x = entered(arguments["x"].transpose(0, 1), step, own, "layers")
    (lengths, count), read = plan.joint_levels, plan.read_rows
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = step.shared.chunk(6, dim=-1)
    attended = compat.called(
        block.self_attention,
        partial(_attention, block.self_attention, plan=plan, cache=cache),
        modulate(block.adaLN_sa_ln(x), shift, scale, lengths),
        image_rotary_emb=step.rope,
    )
    done = gated_add(x[:, :read], gate[:, :count], attended, lengths[:count])
    normed = modulate(block.adaLN_mlp_ln(done), shift_mlp[:, :count], scale_mlp[:, :count], lengths[:count])
    update = _feed_forward(block.mlp, normed, plan.adapters("joint"))
    done = gated_add(done, gate_mlp[:, :count], update, lengths[:count])
    done = done if read is None else torch.cat([done, x[:, read:]], dim=1)
    return done.transpose(0, 1)


def _attention(attn: Any, hidden_states: torch.Tensor, image_rotary_emb: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention_by_halves(attn, hidden_states, image_rotary_emb, **options)


def _feed_forward(module: Any, x: torch.Tensor, rows: AdapterRows | None) -> torch.Tensor:
    """`linear_fc2(up(x) * gelu(gate(x)))`."""
    if rows is None:
        return module(x)

    def compute(x: torch.Tensor) -> torch.Tensor:
        gate = F.gelu(linear(module.gate_proj, x, rows))
        return linear(module.linear_fc2, linear(module.up_proj, x, rows) * gate, rows)

    return compat.called(module, compute, x)


_ROOT = (
    *("x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "adaLN_modulation.1"),
    *("final_norm.linear", "final_linear"),
)
_LAYERS = (
    *(f"self_attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2")),
)

FAMILY = Family(
    classes=("ErnieImageTransformer2DModel",),
    places=places_of_planes,
    text_length=lambda model, arguments: arguments["text_bth"].shape[1],
    text_parts=r"^text_proj$",
    joint_parts=_SEQUENCE,
    image_first=True,
    sequence_first=_SEQUENCE,
    tokens=TokenFormat(
        patch=lambda model, vae: PATCH * model.config.patch_size,
        channels=lambda model: model.config.in_channels * model.config.patch_size**2,
        encode=_encode,
    ),
    conditions=Conditions(
        call=_call,
        rope=_rope,
        position_arguments=("text_lens",),
        vector=_vector,
        shared=_shared,
        blocks=_blocks,
        edges=lambda model: {
            "x_embedder": _embed,
            "time_embedding": known_vector,
            "adaLN_modulation": _known_modulation,
            "final_norm": _read,
            **text_edges(model, ["text_proj"] if model.text_proj is not None else []),
        },
        processors=(ErnieImageSingleStreamAttnProcessor,),
        spatial=True,
    ),
    lora=LoraNames(
        root={name: (name,) for name in _ROOT},
        layers=_LAYERS,
        inputs=("x_embedder.proj",),
        written=True,
        label="ERNIE-Image",
        marks=r"layers[._]\d+[._]self_attention[._]",
        targets=(
            r"x_embedder\.proj|adaLN_modulation\.1|layers\.\d+\.(self_attention\.to_([qkv]|out\.0)|mlp\.linear_fc2)",
        ),
    ),
    mup=Structure(
        roles=(
            ("x_embedder.proj.weight", "input"),
            ("text_proj.weight", "input"),
            ("time_embedding.linear_*.weight", "hidden"),
            ("adaLN_modulation.1.weight", "modulation"),
            ("final_norm.linear.weight", "modulation"),
            ("final_linear.weight", "output"),
            ("final_linear.bias", "finite"),
            ("layers.*.adaLN_*_ln.weight", "vector"),
            ("layers.*.self_attention.norm_[qk].weight", "head"),
            ("layers.*.self_attention.to_*.weight", "hidden"),
            ("layers.*.mlp.*.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("layers.*.self_attention.to_out.0.*", "layers.*.mlp.linear_fc2.*"),
        blocks=("layers.*",),
        width=("hidden_size",),
    ),
)
