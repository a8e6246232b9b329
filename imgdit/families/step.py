"""What families share: the plan of a pass with condition tokens, and what most transformers do at their edges.

B batch, N image tokens, T text tokens, n condition tokens, C channels of a token, F frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from imgdit.attention.cache import KVCache, LayerCache
from imgdit.family import (
    Arguments,
    Block,
    BlockFunction,
    Call,
    Edge,
    Grid,
    NoisyImages,
    TokenFormat,
    timestep_times,
)
from imgdit.frames import Frame
from imgdit.images.latents import encode_images
from imgdit.layout import FrameLayout
from imgdit.lora.rows import on_rows
from imgdit.models.blocks import BlockPlan, double_block, single_block
from imgdit.models.functional import PATCH, pack, rope_table


@dataclass(eq=False)
class Step:
    """What one forward pass needs to know. It travels to the blocks as an argument; nothing in them is switched."""

    layout: FrameLayout
    own: int
    """Frames of the image stream that are the model's own; the conditions' follow them."""
    plan: BlockPlan
    last: BlockPlan
    """Of a block after which nobody reads the conditions."""
    rope: torch.Tensor | None
    """Rotations of text, image and conditions, (S, d/2) or (B, S, d/2), see `Conditions.rope`; `None` for positions
    that are added."""
    tokens: torch.Tensor | None
    """(B, n, C) condition tokens in the sequence; `None`: there are none, or their keys and values come from a
    cache."""
    cache: KVCache | None
    kept: torch.Tensor | None = None
    """Numbers of the image tokens that are computed; `None`: all."""
    full_length: int = 0
    """Image tokens that the transformer returns."""
    vectors: torch.Tensor | None = None
    """(B, F, D) conditioning vector of each frame in the sequence."""
    shared: Any = None
    """What all blocks read besides; see `Conditions.shared`."""
    streams: dict[str, torch.Tensor] | None = None
    """Results of the blocks that depend on `Conditions.timeless` alone, by stream; `None`: they are not kept."""
    waiting: dict[str, torch.Tensor] = field(default_factory=dict)
    """(B, n, D) condition tokens where a model takes its sequence apart, by the place at which they enter it again."""

    @property
    def image_length(self) -> int:
        """Image tokens that are computed."""
        return sum(self.layout.lengths[: self.own])

    @property
    def image_vector(self) -> torch.Tensor:
        """(B, 1, D) conditioning vector of the image that is generated."""
        assert self.vectors is not None
        return self.vectors[:, :1]

    @property
    def condition_length(self) -> int:
        """Condition tokens in the sequence."""
        return sum(self.layout.lengths[self.own :])

    def writes_own(self, references: int) -> None:
        """Let the cache keep keys and values of the pipeline's reference images, though they change with each step.

        Args:
            references: their number; they follow the generated image.
        """
        start = self.layout.text_length + self.layout.lengths[0]
        rows = (slice(start, start + sum(self.layout.lengths[1 : 1 + references])),)
        self.plan, self.last = self.plan._replace(frozen=rows), self.last._replace(frozen=rows)

    def with_key_mask(self, mask: torch.Tensor) -> None:
        """Let nobody see padding of the text.

        Args:
            mask: (B, T + N) of text and image, see `Call.key_mask`; also of all tokens where some are not computed.
        """
        text = self.layout.text_length
        if self.kept is not None and mask.shape[1] - text != self.image_length:
            mask = torch.cat([mask[:, :text], mask[:, text:][:, self.kept]], dim=1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], self.condition_length)], dim=1)
        self.plan, self.last = self.plan._replace(key_mask=mask), self.last._replace(key_mask=mask)


def with_conditions(step: Step, tokens: torch.Tensor) -> torch.Tensor:
    """Image tokens (B, N, C) that are computed, the condition tokens behind them."""
    if step.kept is not None and tokens.shape[1] != step.image_length:
        tokens = tokens[:, step.kept]
    return tokens if step.tokens is None else torch.cat([tokens, step.tokens.to(tokens)], dim=1)


# Calls and blocks


def call_of_tokens(model: Any, arguments: Arguments, key_mask: torch.Tensor | None = None) -> Call:
    """`Conditions.call` of a model that takes tokens (B, N, C) as `hidden_states`. Reference images of the pipeline
    have the noise level of the image that is generated: all are one frame.

    Args:
        model, arguments: of the call; of `pooled_projections`, if there are any, cached keys depend.
        key_mask: see `Call`.
    """
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    pooled = arguments.get("pooled_projections")
    return Call(
        frames=(Frame((1, latents.shape[1])),),
        text_length=text.shape[1],
        length=latents.shape[1],
        latents=latents,
        texts=(text,) if pooled is None else (pooled, text),
        cached_by=latents.new_empty(len(latents), 0) if pooled is None else pooled,
        key_mask=key_mask,
    )


def with_image(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """`Call.key_mask` of text and image.

    Args:
        mask: (B, T) of the text; `None`: all of it is seen.
        length: image tokens, which are all seen.
    """
    return None if mask is None else F.pad(mask, (0, length), value=1)


def block_lists(
    lists: Mapping[str, BlockFunction], attentions: tuple[str, ...] = ("attn",), *, ends: bool = True
) -> Callable[[Any], Iterator[Block]]:
    """`Conditions.blocks` of a model with lists of blocks.

    Args:
        lists: function of the blocks by the path of their list, in the order in which they run.
        attentions: names of a block's attentions.
        ends: after the last block nobody reads the conditions.
    """

    def blocks(model: Any) -> Iterator[Block]:
        for number, (path, function) in enumerate(lists.items(), start=1):
            modules = model.get_submodule(path)
            for i, module in enumerate(modules):
                is_last = ends and number == len(lists) and i == len(modules) - 1
                yield Block(f"{path}.{i}", module, function, attentions, is_last)

    return blocks


def double_and_single(double: BlockFunction, single: BlockFunction) -> Callable[[Any], Iterator[Block]]:
    """`block_lists` of `transformer_blocks` and then `single_transformer_blocks`."""
    return block_lists({"transformer_blocks": double, "single_transformer_blocks": single})


# Edges


def embed_tokens(step: Step, module: Any, original: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """Of the linear layer that embeds tokens: image and condition tokens, each adapter on its own."""
    tokens = with_conditions(step, tokens)
    rows = step.plan.adapters("image")
    return on_rows(module, tokens, rows) if rows is not None and isinstance(module, LoraLayer) else original(tokens)


def known(result: Callable[[Step], torch.Tensor]) -> Edge:
    """Of a module whose result is computed already, for the image and for the conditions.

    Args:
        result: what the model gets of it, for the image and the text.
    """

    def edge(step: Step, module: Any, original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return result(step)

    return edge


def known_vector(step: Step, module: Any, original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of the embedding of timestep, guidance and text: the vector (B, D) of the image, which is computed already."""
    return step.image_vector[:, 0]


def read_image(
    step: Step, module: Any, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Of the last norm: image tokens alone, zeros for those that were left out."""
    out = original(hidden_states[:, : step.image_length], *args, **kwargs)
    if step.kept is None or step.full_length == step.image_length:
        return out
    full = out.new_zeros(out.shape[0], step.full_length, out.shape[2])
    full[:, step.kept] = out
    return full


def text_edges(model: Any, paths: Sequence[str]) -> dict[str, Edge]:
    """Edges for the layers with LoRA in modules that work on text alone, so that the main adapters act there.

    Args:
        model: the bare transformer.
        paths: of the modules.
    """
    return {
        f"{path}.{name}".rstrip("."): _main_adapters
        for path in paths
        for name, layer in model.get_submodule(path).named_modules()
        if isinstance(layer, LoraLayer)
    }


def _main_adapters(step: Step, module: Any, original: Callable, x: torch.Tensor) -> torch.Tensor:
    rows = step.plan.adapters("text")
    return original(x) if rows is None else on_rows(module, x[None], rows._replace(rows=((slice(None), None),)))[0]


# Blocks


def entered(x: torch.Tensor, step: Step, own: int, place: str) -> torch.Tensor:
    """A sequence (B, own, D) of the model's own tokens with the condition tokens that wait for this place behind it;
    one that has them already as it is."""
    return x if x.shape[1] > own or not step.condition_length else torch.cat([x, step.waiting[place]], dim=1)


# Blocks with the submodules of FLUX and SD3


def joint_text_last(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> Any:
    """`double_block` of a class that returns text and image; `None` for a text that ends there."""
    image, text = _run(double_block, block, arguments, step, plan, cache)
    return None if getattr(block, "context_pre_only", False) else text, image


def single_text_first(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> Any:
    """`single_block` of a class that returns text and image."""
    image, text = _run(single_block, block, arguments, step, plan, cache)
    return text, image


def _run(
    function: Callable, block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = step.shared  # (B, F, D)
    return function(
        block,
        arguments["hidden_states"],
        arguments["encoder_hidden_states"],
        vectors,
        vectors[:, :1],
        step.rope,
        plan,
        cache,
    )


# Tokens and grids


def packed_tokens(patch: Callable[[Any, Any], int], channels: Callable[[Any], int]) -> TokenFormat:
    """Scaled and shifted latents, packed as (C, row, column)."""
    return TokenFormat(patch, channels, partial(_encode, patch))


def _encode(
    patch: Callable[[Any, Any], int], model: Any, vae: Any, pixels: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    return pack(encode_images(vae, pixels, generator), patch(model, vae))  # (B, rows * columns, C)


PACKED_TOKENS = packed_tokens(patch=lambda model, vae: PATCH, channels=lambda model: model.config.in_channels)
"""Of models that take 2 x 2 latent cells as a token."""


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


NORMALISED_TOKENS = replace(PACKED_TOKENS, encode=encode_normalised)
"""Of models with FLUX.2's autoencoder."""


def own_positions(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids (T, axes) and (N, axes) of text and image, which pipelines pass with or without a batch."""
    text, image = (ids[0] if ids.ndim == 3 else ids for ids in (arguments["txt_ids"], arguments["img_ids"]))
    return text, image


def rope_of_ids(
    model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None
) -> torch.Tensor:
    """`Conditions.rope` of a model whose image begins at row and column 0, such as FLUX.1."""
    text, image = own_positions(arguments)
    riders = [frame.ids() for frame in conditions]
    return rope_of_positions(text, image, riders, kept, model.pos_embed.theta, model.config.axes_dims_rope)


def rope_of_positions(
    text: torch.Tensor,
    image: torch.Tensor,
    riders: Sequence[torch.Tensor],
    kept: torch.Tensor | None,
    theta: float,
    axes: Sequence[int],
) -> torch.Tensor:
    """Rotations of text, image and conditions, (S, d/2).

    Args:
        text, image: positions (T, axes) and (N, axes) of the model's own tokens.
        riders: positions (n, axes or fewer) of each condition; 0 on further axes.
        kept: of `Conditions.rope`.
        theta: base of the angles.
        axes: features of a head by axis.
    """
    if kept is not None:
        image = image[kept.to(image.device)]
    behind = [F.pad(ids, (0, len(axes) - ids.shape[1])).to(image.device) for ids in riders]
    return rope_table(torch.cat([text.float(), image.float(), *behind]), axes, theta)


def grid_of_ids(ids: torch.Tensor) -> Grid:
    """Grid of the generated image from position ids (N, 3 or more) or (B, N, 3 or more) with rows and columns in the
    second and third coordinate; reference images have another first one.

    Raises:
        ValueError: they are of no grid.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == ids[0, 0], 1:3]
    least, most = torch.stack([own.amin(0), own.amax(0)]).round().long().tolist()
    rows, columns = (b - a + 1 for a, b in zip(least, most, strict=True))
    if rows * columns != len(own):
        raise ValueError(f"img_ids describe {len(own)} tokens in rows of {columns}, which is no grid")
    return rows, columns


def references_of_ids(ids: torch.Tensor) -> tuple[Frame, ...]:
    """Frames of reference images, at the noise level of the call, from position ids as `grid_of_ids` reads them."""
    ids = ids[0] if ids.ndim == 3 else ids
    _, lengths = torch.unique_consecutive(ids[:, 0], return_counts=True)
    _, *references = ids.split(lengths.tolist())
    return tuple(Frame(grid_of_ids(one)) for one in references)


def grid_of_planes(latents: torch.Tensor, patch: int) -> Grid:
    """Grid of tokens of latents (B, C, h, w)."""
    return latents.shape[2] // patch, latents.shape[3] // patch


def timestep_of_config(model: Any, arguments: Arguments) -> float:
    """`Family.timestep` of a model whose configuration has the factor, `timestep_scale`."""
    return timestep_times(model.config.timestep_scale)(model, arguments)


def training_arguments(images: NoisyImages) -> dict[str, Any]:
    """What most models call tokens, text and noise level while they are trained."""
    return {"hidden_states": images.tokens, "encoder_hidden_states": images.text, "timestep": images.sigma}


def training_ids(images: NoisyImages) -> torch.Tensor:
    """Positions (N, 3) of an image that begins at row and column 0."""
    return Frame(images.grid).ids().to(images.tokens.device)


def places_of_ids(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...]:
    """`Family.places` of a model that is given `img_ids`."""
    return one_image(grid_of_ids(arguments["img_ids"]))


def references_in_ids(model: Any, arguments: Arguments) -> tuple[Frame, ...]:
    """`Conditions.references` of a model that is given `img_ids`."""
    return references_of_ids(arguments["img_ids"])


def sigma_of_timestep(model: Any, arguments: Arguments) -> torch.Tensor:
    """`Conditions.sigma` of a model whose timestep is the noise level."""
    return arguments["timestep"].float()


def timestep_of_frame(arguments: Arguments, frame: Frame, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Timesteps (B,) in [0, 1000] of a frame: of its own noise level, of the call's where it has none.

    Args:
        arguments: of a model whose timestep is the noise level.
        dtype: in which the model multiplies it by 1000; `None`: the one that it computes in.
    """
    timestep = arguments["timestep"].to(dtype or compute_dtype(arguments["hidden_states"])) * 1000
    return timestep if frame.sigma is None else torch.full_like(timestep, frame.sigma * 1000)


def guidance_of_frame(arguments: Arguments, frame: Frame, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """Embedded guidance (B,) of a frame, times 1000: its own where it has a noise level of its own, 1 where it says
    none, else the call's. `None`: the model has none.

    Args:
        arguments, dtype: as in `timestep_of_frame`.
    """
    guidance = arguments.get("guidance")
    if guidance is None:
        return None
    guidance = guidance.to(dtype or compute_dtype(arguments["hidden_states"])) * 1000
    return guidance if frame.sigma is None else torch.full_like(guidance, 1000.0 * (frame.guidance or 1.0))


def reads_references(instead: str) -> str:
    """For `Training.refused`: why the folder of an editing pipeline is not trained on.

    Args:
        instead: repository of the model of the same class that is.
    """
    return (
        "its text encoder reads the reference images with each prompt, and images with captions have none. Train on "
        f"{instead}, whose transformer is of the same class; the adapter acts on the tokens of its condition alone, "
        "and OmniControl loads it into the editing pipeline, beside the references"
    )


def compute_dtype(latents: torch.Tensor) -> torch.dtype:
    """The type that a model computes in: that of autocast, or of its latents."""
    device = latents.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else latents.dtype


def one_image(grid: Grid) -> tuple[tuple[slice, Grid], ...]:
    """`Family.places` of one image whose tokens are the first."""
    return ((slice(0, grid[0] * grid[1]), grid),)


def places_of_planes(model: Any, arguments: Arguments) -> tuple[tuple[slice, Grid], ...] | None:
    """`Family.places` of a model that cuts latents `hidden_states` (B, C, h, w) into its tokens, if it has patches."""
    patch = getattr(model.config, "patch_size", None)
    if patch is None:
        return None
    patch = patch if isinstance(patch, int) else patch[-1]
    return one_image(grid_of_planes(arguments["hidden_states"], patch))
