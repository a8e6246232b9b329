"""Qwen-Image 2.1 of diffusers: text, reference images and the generated image in one sequence, in which nothing sees
what comes behind it; what comes before the image is at noise level 0, and the pipeline keeps its keys and values.

A condition is one more reference image before the generated one: text and references do not see it, and it does not
see the image. It is computed behind the image, so that the pipeline's keys and values serve steps with and without it.

B batch, P tokens before the image (text and references), N image tokens, n condition tokens, S all tokens in the
sequence, D width, F frames, H heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor, QwenImage21KVCache
from peft.tuners.lora import LoraLayer

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.attention.grouped import grouped_attention
from imgdit.families.names import QKV
from imgdit.families.step import Step, entered, packed_tokens, text_edges, with_conditions
from imgdit.families.streams import gated_feed_forward
from imgdit.family import Arguments, Block, Call, Conditions, Family, Grid, LoraNames, timestep_times
from imgdit.frames import Frame, TextFrame
from imgdit.layout import FrameLayout, RowGroup, on_device, ranked
from imgdit.lora.rows import linear, on_rows
from imgdit.models.blocks import BlockPlan
from imgdit.models.functional import apply_rope, gated_add, in_range, modulate, rope_table
from imgdit.mup.structure import Structure

SLOT = 4
"""Tokens of an image for which the text encoder has one place."""
_ADAPTED: WeakKeyDictionary[QwenImage21KVCache, tuple[str, ...]] = WeakKeyDictionary()
"""Adapters that acted on all tokens when a pipeline's keys and values were written."""


def _references(arguments: Arguments) -> int:
    """Tokens of the reference images."""
    return sum(map(prod, arguments["img_shapes"][0][:-1]))


def _text(arguments: Arguments) -> int:
    """Text tokens: the encoder's places but for those of the images."""
    return arguments["img_mask"].shape[1] - arguments["hidden_states"].shape[1] // SLOT


def _is_cached(arguments: Arguments) -> bool:
    """Whether the model reads what comes before the image from the pipeline's cache."""
    return arguments.get("kv_cache_mode") == "cached"


def _prefix(arguments: Arguments) -> int:
    """Tokens in the sequence before the image."""
    return 0 if _is_cached(arguments) else _text(arguments) + _references(arguments)


def _places(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...]:
    """In the image stream the generated image is the last."""
    start, (frames, rows, columns) = _references(arguments), arguments["img_shapes"][0][-1]
    return ((slice(start, start + frames * rows * columns), (frames * rows, columns)),)


def _text_length(model: Any, arguments: Arguments) -> int:
    """Where what comes before the image is not in the sequence, this begins with the image."""
    return -_references(arguments) if _is_cached(arguments) else _text(arguments)


def _call(model: Any, arguments: Arguments) -> Call:
    latents = arguments["hidden_states"]
    length = latents.shape[1] - _references(arguments)
    return Call(
        frames=(Frame((1, length)),),
        text_length=_prefix(arguments),
        length=length,
        latents=latents,
        texts=(arguments["encoder_hidden_states"],),
        cached_by=latents.new_empty(len(latents), 0),
    )


def _embedded_time(model: Any, arguments: Arguments, sigma: float | None) -> torch.Tensor:
    latents = arguments["hidden_states"]
    timestep = arguments["timestep"].to(latents.dtype)
    return model.time_text_embed(timestep if sigma is None else torch.full_like(timestep, sigma), latents)


class _Pass(NamedTuple):
    """What the blocks of a pass read besides tokens."""

    vectors: torch.Tensor
    """(B, 1 + F, D) of what comes before the image, and of the frames."""
    modulation: torch.Tensor
    """(B, 1 + F, 4D) of the same."""
    groups: tuple[RowGroup, ...]
    """Who of image and conditions sees whom: queries among them, keys in the sequence with what comes before."""
    last: tuple[RowGroup, ...]
    """The same of a block after which nobody reads the conditions."""


def _pass_arguments(model: Any, arguments: dict[str, Any], step: Step) -> dict[str, Any]:
    """The arguments as they are; the plan of the pass is made from them."""
    cache, everywhere = arguments.get("kv_cache"), step.layout.everywhere
    if arguments.get("kv_cache_mode") == "extract":
        _ADAPTED[cache] = everywhere
    elif _is_cached(arguments) and _ADAPTED.get(cache, ()) != everywhere:
        raise ValueError(
            "an adapter that acts on all tokens begins to act when the pipeline has kept keys and values of the text "
            "without it; pass use_kv_cache=False to the pipeline, or use start=0"
        )
    assert step.vectors is not None
    before = _embedded_time(model, arguments, 0.0 if model.config.causal_condition else None)
    vectors = torch.cat([before[:, None], step.vectors], dim=1)
    activation, project = model.modulation
    modulation = linear(project, activation(vectors), step.plan.adapters("joint_vectors"))
    prefix, device = _text(arguments) + _references(arguments), vectors.device
    step.shared = _Pass(vectors, modulation, *_groups(step, prefix, device))
    shapes, mask, start = arguments["img_shapes"], arguments["img_mask"], prefix - _prefix(arguments)
    step.rope, _ = step.layout.kept(
        ("rope", id(shapes), id(mask), start, device),
        lambda: (_rope(model, arguments, step, device)[start:], (shapes, mask)),  # holding them: their ids stay theirs
    )
    return arguments


def _groups(step: Step, prefix: int, device: torch.device) -> tuple[tuple[RowGroup, ...], tuple[RowGroup, ...]]:
    """Of image and conditions, and of the image alone. The image sees all. A condition sees itself, and but in
    independent mode what comes before the image; with an adapter that acts on all tokens conditions before it too."""
    layout = step.layout

    def build() -> tuple[tuple[RowGroup, ...], tuple[RowGroup, ...]]:
        visible = torch.eye(1 + len(layout.frames), dtype=torch.bool)
        visible[1] = layout.visible[1]
        for segment, frame in enumerate(layout.frames[1:], start=2):
            first = {"self": segment, "joint": 1, "all": 1}[frame.sees]
            visible[segment, :1] = layout.visible[segment, :1] if first == 1 else False
            if frame.sees == "all":
                visible[segment, 2:segment] = layout.visible[segment, 2:segment]
        causal = FrameLayout(
            frames=layout.frames,
            texts=(TextFrame(prefix),),
            scenes=layout.scenes,
            text_scenes=layout.text_scenes,
            visible=visible,
            cached=layout.cached,
        )
        groups = on_device(causal.groups, device)
        rows = causal.lengths
        return _asking(groups, prefix, sum(rows)), _asking(groups, prefix, rows[0])

    return layout.kept(("causal", prefix, device), build)


def _asking(groups: Sequence[RowGroup], start: int, count: int) -> tuple[RowGroup, ...]:
    """The groups of so many rows, which are counted from the first of them."""
    rows = [
        group._replace(
            queries=tuple(
                slice(part.start - start, min(part.stop - start, count))
                for part in group.queries
                if start <= part.start < start + count
            )
        )
        for group in groups
    ]
    return ranked(rows)


def _rope(model: Any, arguments: Arguments, step: Step, device: torch.device) -> torch.Tensor:
    """(P + N + n, d/2) of what comes before the image, the image, and conditions in the sequence.

    A condition of index i from 1 on has the place of one more reference image behind the pipeline's, the i-th, and the
    image moves behind it; others are counted from the image's place.
    """
    shapes, mask = arguments["img_shapes"][0], arguments["img_mask"]
    is_image = torch.repeat_interleave(mask[0], torch.where(mask[0], SLOT, 1))
    own = model.pos_embed(shapes, is_image, device=device)
    place = float(_text(arguments) + sum(max(rows, columns) for _, rows, columns in shapes[:-1]))
    *_, rows, columns = shapes[-1]
    corner = torch.tensor([0.0, -(rows - rows // 2), -(columns - columns // 2)])
    layout, starts, moved = step.layout, {}, 0.0
    conditions = [frame for frame in layout.frames[step.own :] if frame.index >= 1]
    for index in sorted({frame.index for frame in conditions}):
        starts[index] = moved - index  # instead of what the frame's own positions count
        moved += max(max(frame.size) * frame.scale for frame in conditions if frame.index == index)

    def table(ids: torch.Tensor) -> torch.Tensor:
        return rope_table(ids.to(device), model.config.axes_dims_rope, model.pos_embed.theta)

    if moved:
        image = rows * columns
        own = torch.cat([own[:-image], own[-image:] * table(torch.tensor([[moved, 0.0, 0.0]]))])
    riders = []
    for frame in (layout.frames[i] for i in layout.live[step.own :]):
        shift = torch.tensor([place + starts.get(frame.index, moved), 0.0, 0.0])
        riders.append(table(frame.ids() + corner + shift))
    return torch.cat([own, *riders])


# Edges and blocks


def _embed(step: Step, module: Any, original: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """Of the embedding of tokens: references and image (B, R + N, D). Condition tokens wait for the first block."""
    length, rows = tokens.shape[1], step.plan.adapters("image")
    tokens, before = with_conditions(step, tokens), length - step.image_length
    if rows is None or not isinstance(module, LoraLayer):
        embedded = original(tokens)
    else:
        moved = ((slice(part.start + before, part.stop + before), owner) for part, owner in rows.rows)
        embedded = on_rows(module, tokens, rows._replace(rows=((slice(0, before), None), *moved)))
    step.waiting["layers"] = embedded[:, length:]
    return embedded[:, :length]


def _stock(vectors: torch.Tensor, timesteps: int) -> torch.Tensor:
    """Vectors of the image, and that of noise level 0 behind them where the model asks for it."""
    image = vectors[:, 1]
    return image if timesteps == len(image) else torch.cat([image, vectors[:1, 0]])


def _known_vectors(step: Step, module: Any, original: Callable, timestep: torch.Tensor, *args: Any) -> torch.Tensor:
    return _stock(step.shared.vectors, len(timestep))


def _known_modulation(step: Step, module: Any, original: Callable, vectors: torch.Tensor) -> torch.Tensor:
    return _stock(step.shared.modulation, len(vectors))


def _read(step: Step, module: Any, original: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Of the last norm: what the model's own sequence has."""
    return original(x[:, : step.layout.text_length + step.image_length], *args)


def _blocks(model: Any) -> Iterator[Block]:
    last = len(model.transformer_blocks) - 1
    for i, module in enumerate(model.transformer_blocks):
        yield Block(f"transformer_blocks.{i}", module, _block, ends_conditions=i == last)


def _block(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> torch.Tensor:
    """Text and references, image, conditions (B, S, D) of a `QwenImage21TransformerBlock`."""
    before, read = step.layout.text_length, plan.read_rows
    x = entered(arguments["hidden_states"], step, before + step.image_length, "layers")
    of: _Pass = step.shared
    lengths, modulation = (before, *plan.frame_lengths), of.modulation
    count = len(lengths) if plan.read is None else plan.read
    if not before:
        lengths, modulation, count = lengths[1:], modulation[:, 1:], count - 1
    scale, gate, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
    none = torch.zeros_like(scale)
    attended = compat.called(
        block.attn,
        partial(_attention, block.attn, arguments=arguments, before=before, of=of, plan=plan, cache=cache),
        hidden_states=modulate(block.img_norm1(x), none, scale, lengths),
        rotary_emb=step.rope,
    )
    done = gated_add(x[:, :read], gate[:, :count].tanh(), attended, lengths[:count])
    normed = modulate(block.img_norm2(done), none[:, :count], scale_mlp[:, :count], lengths[:count])
    update = gated_feed_forward(block.img_mlp, ("gate_layer", "proj", "out"), normed, plan.adapters("joint"))
    done = in_range(gated_add(done, gate_mlp[:, :count].tanh(), update, lengths[:count]))
    return done if read is None else torch.cat([done, x[:, read:]], dim=1)


def _attention(
    attn: Any,
    hidden_states: torch.Tensor,
    rotary_emb: torch.Tensor,
    *,
    arguments: Arguments,
    before: int,
    of: _Pass,
    plan: BlockPlan,
    cache: LayerCache | None,
) -> torch.Tensor:
    """What comes before the image as the model computes it, then image and conditions: (B, rows that are read, D)."""
    rows, asking = plan.adapters("joint"), hidden_states[:, : plan.read_rows]

    def heads(module: Any, x: torch.Tensor) -> torch.Tensor:
        return linear(module, x, rows).unflatten(-1, (-1, attn.inner_dim // attn.heads))

    query = apply_rope(attn.norm_q(heads(attn.to_q, asking)), rotary_emb[: asking.shape[1]])
    key = apply_rope(attn.norm_k(heads(attn.to_k, hidden_states)), rotary_emb)
    value = heads(attn.to_v, hidden_states)
    cached = None if cache is None else cache.exchange("attn", key, value, plan.frozen)
    key, value = _with_kept(arguments, before, key, value)
    valid, parts = _valid(arguments, key.shape[1]), []
    if before:
        seen = None if valid is None else valid[:, None, None]
        for start, stop, is_text in arguments["segments"]:
            parts.append(_segment(query[:, start:stop], key[:, :stop], value[:, :stop], seen, is_text))
    groups = of.groups if plan.read is None else of.last
    backend = compat.processor_backend(attn)
    parts.append(
        grouped_attention(query[:, before:], key, value, groups, key_mask=valid, cached=cached, backend=backend)
    )
    return attn.to_out[1](linear(attn.to_out[0], torch.cat(parts, dim=1).flatten(2).to(query.dtype), rows))


def _with_kept(
    arguments: Arguments, before: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with those that the pipeline keeps, which are written in its first step."""
    store = arguments.get("layer_cache")
    if store is None:
        return key, value
    if arguments["kv_cache_mode"] == "extract":
        store.store(key[:, :before].clone(), value[:, :before].clone())
        return key, value
    return torch.cat([store.k, key], dim=1), torch.cat([store.v, value], dim=1)


def _valid(arguments: Arguments, length: int) -> torch.Tensor | None:
    """(B, keys), False on padded text; `None`: there is none."""
    seen = arguments.get("key_valid")
    if seen is None and isinstance(arguments.get("attention_mask"), torch.Tensor):
        seen = arguments["attention_mask"][:, 0, 0]
    return None if seen is None else torch.nn.functional.pad(seen, (0, length - seen.shape[1]), value=True)


def _segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None, is_text: bool
) -> torch.Tensor:
    """Attention of a run of text, each token of which sees those before it, or of a reference image.

    Args:
        query: (B, n, H, d) of the run.
        key, value: of all up to its end.
        seen: boolean (B, 1, 1, all keys), or `None`.
    """
    count, stop = query.shape[1], key.shape[1]
    mask = None if seen is None else seen[..., :stop]
    if is_text:
        causal = torch.ones(count, stop, dtype=torch.bool, device=query.device).tril(stop - count)
        mask = causal if mask is None else causal & mask
    return compat.dispatch_attention(query, key, value, mask, None, None)


_LAYERS = (*QKV, "attn.to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out")
_ROOT = (
    *("img_in", "txt_in.in_layer", "txt_in.out_layer", "modulation.1", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)

FAMILY = Family(
    classes=("QwenImage21Transformer2DModel",),
    places=_places,
    timestep=timestep_times(1000.0),
    text_length=_text_length,
    text_parts=r"^txt_in$",
    joint_parts=r"^(transformer_blocks|norm_out|proj_out)$",
    guides_in_batch=False,
    tokens=packed_tokens(
        patch=lambda model, vae: model.config.patch_size,
        channels=lambda model: model.config.in_channels * model.config.patch_size**2,
    ),
    conditions=Conditions(
        call=_call,
        position_arguments=("img_shapes", "img_mask"),
        vector=lambda model, arguments, frame: _embedded_time(model, arguments, frame.sigma),
        arguments=_pass_arguments,
        blocks=_blocks,
        edges=lambda model: {
            "img_in": _embed,
            "time_text_embed": _known_vectors,
            "modulation": _known_modulation,
            "norm_out": _read,
            **text_edges(model, ["txt_in"]),
        },
        processors=(QwenImage21AttnProcessor,),
        without_references="keeps keys and values of its pipeline's reference images, and of text that sees them",
    ),
    lora=LoraNames(
        root={name: (name,) for name in _ROOT},
        layers=_LAYERS,
        inputs=("img_in",),
        written=True,
        label="Qwen-Image 2.1",
        marks=r"img_mlp[._](proj|gate_layer|out)$|txt_in[._](in|out)_layer",
        targets=(r"img_in|modulation\.1|transformer_blocks\.\d+\.(attn\.to_[qkv]|attn\.to_out\.0|img_mlp\.out)",),
    ),
    mup=Structure(
        roles=(
            ("img_in.weight", "input"),
            ("txt_in.text_norm.weight", "finite"),
            ("txt_in.in_layer.weight", "input"),
            ("txt_in.out_layer.weight", "hidden"),
            ("time_text_embed.timestep_embedder.linear_1.weight", "input"),
            ("time_text_embed.timestep_embedder.linear_2.weight", "hidden"),
            ("modulation.1.weight", "modulation"),
            ("norm_out.linear.weight", "modulation"),
            ("proj_out.weight", "output"),
            ("transformer_blocks.*.attn.norm_[qk].weight", "head"),
            ("transformer_blocks.*.attn.to_*.weight", "hidden"),
            ("transformer_blocks.*.img_mlp.*.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("transformer_blocks.*.attn.to_out.0.*", "transformer_blocks.*.img_mlp.out.*"),
        blocks=("transformer_blocks.*",),
        less_one=("txt_in.text_norm.weight",),
    ),
)
