"""FLUX.3 of diffusers: reference images as a stream of their own, which conditions join.

The model takes the tokens and positions of its reference images as arguments. They have blocks and modulation of their
own, always at noise level 0, and then go through the joint blocks behind the image. Conditions are given as such
arguments, behind the pipeline's own.

B batch, N tokens of the generated image, n of references and conditions, T text tokens, S all tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor
from peft.tuners.lora import LoraLayer

from imgdit.attention.cache import LayerCache
from imgdit.families.step import NORMALISED_TOKENS, Step, grid_of_ids, one_image, rope_of_positions, text_edges
from imgdit.families.streams import fused_feed_forward
from imgdit.family import Arguments, Block, Call, Conditions, Edge, Family, LoraNames, timestep_times
from imgdit.frames import Frame, TextFrame
from imgdit.layout import FrameLayout
from imgdit.lora.rows import on_rows
from imgdit.models.blocks import BlockPlan, attend, block_plans
from imgdit.mup.structure import Structure

HALF = 0.5
"""Pipelines halve the rows and columns of images."""
_CONDITIONS = "mode_blocks.image_cond"
"""Blocks of references and conditions."""
_STREAM = ("x_embedders", "early_stream_modulations", "single_stream_modulations")
"""Modules with a part for each stream, outside of the blocks."""


def _references(model: Any, arguments: Arguments) -> tuple[Frame, ...]:
    """Reference i has the fourth coordinate -(1 + i)."""
    ids = arguments.get("image_cond_ids")
    if ids is None:
        return ()
    _, lengths = torch.unique_consecutive(ids[:, 3], return_counts=True)
    return tuple(Frame(grid_of_ids(one.float() / HALF), sigma=0.0) for one in ids.split(lengths.tolist()))


def _call(model: Any, arguments: Arguments) -> Call:
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    references, target = arguments.get("image_cond_hidden_states"), arguments.get("target_timestep")
    count = 0 if references is None else references.shape[1]
    own = (Frame((1, count), sigma=0.0),) if count else ()
    return Call(
        frames=(Frame((1, latents.shape[1])), *own),
        text_length=text.shape[1],
        length=latents.shape[1] + count,
        latents=latents,
        texts=(text,),
        # A flow map's references are modulated by the timestep that the step leads to.
        cached_by=latents.new_empty(len(latents), 0) if target is None else target.to(latents.dtype)[:, None],
    )


def _condition_ids(conditions: Sequence[Frame]) -> list[torch.Tensor]:
    """Positions (n, 4) of each condition: of index i those of reference i."""
    ids = [frame.ids() for frame in conditions]
    return [torch.cat([one[:, :1] * 0, one[:, 1:] * HALF, -(1 + one[:, :1])], dim=1) for one in ids]


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    image, references = arguments["img_ids"], arguments.get("image_cond_ids")
    own = image if references is None else torch.cat([image, references])
    riders = _condition_ids(conditions)
    text, config = arguments["txt_ids"], model.config
    return rope_of_positions(text, own, riders, kept, config.rope_theta, config.axes_dims_rope)


def _pass_arguments(model: Any, arguments: dict[str, Any], step: Step) -> dict[str, Any]:
    """What of the references is seen, the conditions behind it; `None` where nothing is left."""
    image = arguments["hidden_states"].shape[1]
    tokens: Any = arguments.get("image_cond_hidden_states")
    ids: Any = arguments.get("image_cond_ids")
    if tokens is not None and step.kept is not None:
        kept = step.kept[image:] - image
        tokens, ids = tokens[:, kept], ids[kept.to(ids.device)]
    if step.tokens is not None:
        first = arguments["hidden_states"]
        riders = [step.layout.frames[i] for i in step.layout.live[step.own :]]
        parts = [step.tokens.to(first)] if tokens is None else [tokens, step.tokens.to(first)]
        places = [one.to(arguments["img_ids"].device) for one in _condition_ids(riders)]
        tokens, ids = torch.cat(parts, dim=1), torch.cat(places if ids is None else [ids.float(), *places])
    if tokens is not None and not tokens.shape[1]:
        tokens = ids = None
    step.shared = _stream_plan(step, arguments["hidden_states"].device)
    return arguments | {"image_cond_hidden_states": tokens, "image_cond_ids": ids}


def _stream_plan(step: Step, device: torch.device) -> BlockPlan:
    """Of the stream of references and conditions alone."""
    layout = step.layout

    def build() -> FrameLayout:
        others = [0, *range(2, 1 + len(layout.frames))]  # segments but the image; the text has no token here
        references = (replace(one, sigma=None, reference=True) for one in layout.frames[1 : step.own])  # not cached
        return FrameLayout(
            frames=(*references, *layout.frames[step.own :]),
            texts=(TextFrame(length=0),),
            scenes=layout.scenes[1:],
            text_scenes=layout.text_scenes,
            visible=layout.visible[others][:, others],
            cached=frozenset(segment - 1 for segment in layout.cached),
            main_adapters=layout.main_adapters,
        )

    stream = layout.kept("references and conditions", build)
    return block_plans(stream, device, writes=step.cache is not None and step.cache.mode == "write")[0]


def _timeless(model: Any) -> tuple[str, ...]:
    """The blocks of text and references, unless they are modulated by the timestep that a step leads to."""
    text = ("encoder_hidden_states", "txt_ids")
    return () if model.config.flow_map else (*text, "image_cond_hidden_states", "image_cond_ids")


def _blocks(model: Any) -> Iterator[Block]:
    for path, modules in (("txt_mode_blocks", model.txt_mode_blocks), (_CONDITIONS, model.mode_blocks["image_cond"])):
        for i, module in enumerate(modules):
            yield Block(f"{path}.{i}", module, partial(_stream_block, path, i == len(modules) - 1))
    last = len(model.single_transformer_blocks) - 1
    for i, module in enumerate(model.single_transformer_blocks):
        yield Block(f"single_transformer_blocks.{i}", module, _joint_block, ends_conditions=i == last)


def _stream_block(
    path: str, is_last: bool, block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> torch.Tensor:
    """Text (B, T, D), or references and conditions (B, n, D), of a `Flux3ModeTransformerBlock`."""
    x, kept = arguments["hidden_states"], step.streams
    if kept is not None and path in kept:
        return kept[path]
    assert step.rope is not None
    length = x.shape[1]
    if path == _CONDITIONS:
        plan, rope = step.shared, step.rope[-length:]
    else:
        lora = None if plan.lora is None else plan.lora._replace(joint=plan.lora.text)
        plan, rope, cache = BlockPlan((length,), (), lora=lora), step.rope[:length], None
    shift, scale, gate = arguments["temb_mod"].chunk(3, dim=-1)
    x = x + gate * _update(block, block.norm(x) * (1 + scale) + shift, rope, plan, cache)
    if kept is not None and is_last:
        kept[path] = x
    return x


def _joint_block(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text (B, T, D) and image, references and conditions (B, N + n, D) of a `Flux3SingleTransformerBlock`."""
    text, content = arguments["encoder_hidden_states"], arguments["hidden_states"]
    shift_t, scale_t, gate_t = arguments["temb_mod_context"].chunk(3, dim=-1)
    shift, scale, gate = arguments["temb_mod"].chunk(3, dim=-1)
    normed = [block.norm(text) * (1 + scale_t) + shift_t, block.norm(content) * (1 + scale) + shift]
    update = _update(block, torch.cat(normed, dim=1), step.rope, plan, cache)
    update_t, update = update.split([text.shape[1], update.shape[1] - text.shape[1]], dim=1)
    read = update.shape[1]
    done = content[:, :read] + gate[:, :read] * update
    return text + gate_t * update_t, torch.cat([done, content[:, read:]], dim=1)


def _update(block: Any, x: torch.Tensor, rope: Any, plan: BlockPlan, cache: LayerCache | None) -> torch.Tensor:
    """Attention and MLP side by side: (B, rows that are read, D)."""
    attended = attend(block.attn, x, None, rope, plan=plan, cache=cache)
    return attended + fused_feed_forward(block.ff, x[:, : plan.read_rows], plan.adapters("joint"))


def _edges(model: Any) -> dict[str, Edge]:
    """The layers with LoRA outside of the blocks that conditions go through."""
    others = ["context_embedder", "mode_blocks.image"]
    others += [f"{name}.image" for name in _STREAM] + [f"{name}.txt" for name in _STREAM[1:]]
    edges = text_edges(model, others)
    for name in _STREAM:
        for path, layer in model.get_submodule(f"{name}.image_cond").named_modules():
            if isinstance(layer, LoraLayer):
                edges[f"{name}.image_cond.{path}".rstrip(".")] = _stream_rows
    return edges


def _stream_rows(step: Step, module: Any, original: Callable, x: torch.Tensor) -> torch.Tensor:
    """Of a layer of the stream of references and conditions: each adapter on its own tokens."""
    rows = step.shared.adapters("joint")
    return original(x) if rows is None else on_rows(module, x, rows)


FAMILY = Family(
    classes=("Flux3Transformer2DModel",),
    places=lambda model, arguments: one_image(grid_of_ids(arguments["img_ids"].float() / HALF)),
    timestep=timestep_times(1000.0),
    # Modules of the reference images' stream are read as the text's are: whole.
    text_parts=r"^txt|^context_embedder$|^image_cond$",
    joint_parts=r"^single_transformer_blocks$",
    image_places={"Flux3SingleTransformerBlock": 1},
    guides_in_batch=False,
    guides_by_second_call=True,
    tokens=replace(NORMALISED_TOKENS, channels=lambda model: model.config.cond_in_channels),
    conditions=Conditions(
        call=_call,
        rope=_rope,
        position_arguments=("txt_ids", "img_ids", "image_cond_ids"),
        vector=lambda model, arguments, frame: arguments["timestep"][:, None],  # the model modulates by token itself
        shared=lambda model, vectors, plan: None,
        arguments=_pass_arguments,
        clean_only=True,
        blocks=_blocks,
        edges=_edges,
        processors=(Flux3AttnProcessor,),
        timeless=_timeless,
        references=_references,
    ),
    lora=LoraNames(
        label="FLUX.3",
        marks=r"_mode_blocks[._]|x_embedders[._]",
        shared=r"single_transformer_blocks[._]\d+[._]ff[._]linear",
        targets=(
            r"x_embedders\.image_cond",
            r"(mode_blocks\.image_cond|single_transformer_blocks)\.\d+\.(attn\.to_([qkv]|out\.0)|ff\.linear_out)",
        ),
    ),
    mup=Structure(
        roles=(
            ("x_embedders.*.weight", "input"),
            ("context_embedder.weight", "input"),
            ("*timestep_embedder.linear_1.weight", "input"),
            ("*timestep_embedder.linear_2.weight", "hidden"),
            ("*_stream_modulations.*.linear.weight", "modulation"),
            ("norm_out.linear.weight", "modulation"),
            ("proj_out.weight", "output"),
            ("*.attn.norm_[qk].weight", "head"),
            ("*_blocks.*.attn.to_*.weight", "hidden"),
            ("*_blocks.*.ff.linear_*.weight", "hidden"),
            ("*.bias", "vector"),
        ),
        queries=(("*.norm_q.weight",),),
        branches=("*_blocks.*.attn.to_out.0.*", "*_blocks.*.ff.linear_out.*"),
        blocks=("*_blocks.*",),
        depth=("num_layers", "num_single_layers"),
    ),
)
