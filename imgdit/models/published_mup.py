"""The published checkpoints of μP for diffusion transformers (arXiv 2505.15270) as diffusers models.

They are plain torch files with the key names of the original DiT and PixArt-α and no configuration. The reference
multiplies the readout's input by output multiplier * base width / width; that factor is folded into the readout's
weight, which is exact, so nothing at run time has to know of μP. The configuration keeps the settings, by which
`imgdit.mup.param_groups` scales the rates of further training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from imgdit.mup import configure

BASE_WIDTH, HEAD_DIM = 288, 72
"""Of every published checkpoint."""

_MLP_RATIO = 4
"""Of diffusers' DiT and PixArt, whose configurations do not have it."""

Renamed = Iterator[tuple[str, torch.Tensor]]


class _Layout(NamedTuple):
    """Old names to new ones, with {i} for the number of the block; a tuple takes equal parts of the rows."""

    shared: dict[str, str]
    block: dict[str, str | tuple[str, ...]]
    readout: str
    """Old name of the readout."""


_ATTENTION: dict[str, str | tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_DIT = _Layout(
    shared={
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    },
    block={**_ATTENTION, "adaLN_modulation.1": "norm1.linear"},
    readout="final_layer.linear",
)
# diffusers' DiT has a copy of these in every block.
_DIT_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_PIXART = _Layout(
    shared={
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
        "final_layer.scale_shift_table": "scale_shift_table",
    },
    block={
        **_ATTENTION,
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
        "cross_attn.proj": "attn2.to_out.0",
        "scale_shift_table": "scale_shift_table",
    },
    readout="final_layer.linear",
)
# Not parameters: the table of positions, and the caption that PixArt-α drops to while training.
_POSITIONS, _NULL_CAPTION = "pos_embed", "y_embedder.y_embedding"


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a published file: its running average, if it keeps one.

    Only tensors and plain values are unpickled (DiT's files hold an `argparse.Namespace` beside them).

    Raises:
        ValueError: no such file, a file that would run code, or one without weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:  # torch raises pickle's, zip's and its own errors
        raise ValueError(f"{path} cannot be read as a torch file of tensors and plain values: {error}") from error
    for key in ("ema", "state_dict_ema", "model", "state_dict"):
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
            break
    if not isinstance(values, Mapping) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise ValueError(f"{path} holds no weights: expected a mapping of names to tensors, under ema or state_dict")
    return {name.removeprefix("module."): value for name, value in values.items()}


def convert_dit(
    weights: Mapping[str, torch.Tensor],
    *,
    head_dim: int = HEAD_DIM,
    base_width: int = BASE_WIDTH,
    output_mult: float = 1.0,
) -> DiTTransformer2DModel:
    """DiT-μP as diffusers' DiT.

    diffusers computes DiT's timestep features with 127 instead of 128 frequency steps, as for every DiT it loads;
    `original_timesteps` makes a loaded model compute what the checkpoint was trained with.

    Args:
        weights: of the original DiT with learned sigma or without.
        head_dim: features of a head.
        base_width: μP's base width.
        output_mult: μP's output multiplier.

    Raises:
        ValueError: weights of another structure; names the first one that does not fit.
    """
    width = _width(weights)
    config = {
        **_shape_config(weights, head_dim),
        # With dropout of classes the table has one row more.
        "num_embeds_ada_norm": len(_get(weights, "y_embedder.embedding_table.weight")) - 1,
        "norm_eps": 1e-6,
    }
    _positions_scale(weights, width, (1.0,))
    factor = output_mult * base_width / width
    renamed = _renamed(weights, _DIT, factor, _blocks(weights), _DIT_EMBEDDERS)
    model = _loaded(DiTTransformer2DModel, config, renamed)
    configure(model, base_width=base_width, output_mult=output_mult)
    return model


def convert_pixart(
    weights: Mapping[str, torch.Tensor],
    *,
    head_dim: int = HEAD_DIM,
    base_width: int = BASE_WIDTH,
    output_mult: float = 1.0,
) -> PixArtTransformer2DModel:
    """PixArt-α-μP as diffusers' PixArt; arguments and errors as in `convert_dit`."""
    width = _width(weights)
    config = {
        **_shape_config(weights, head_dim),
        "cross_attention_dim": width,
        "caption_channels": _get(weights, "y_embedder.y_proj.fc1.weight").shape[1],
        "interpolation_scale": _positions_scale(weights, width, (1.0, 0.5, 2.0)),
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in weights,
    }
    factor = output_mult * base_width / width
    model = _loaded(PixArtTransformer2DModel, config, _renamed(weights, _PIXART, factor, _blocks(weights)))
    configure(model, base_width=base_width, output_mult=output_mult)
    return model


def original_timesteps(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Let a converted model compute its timestep features as the original DiT; changes and returns it.

    The difference is not a setting of diffusers' class, so `from_pretrained` does not restore it.
    """
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def _renamed(
    weights: Mapping[str, torch.Tensor],
    layout: _Layout,
    factor: float,
    blocks: int,
    embedders: Mapping[str, str] = MappingProxyType({}),
) -> Renamed:
    """Weights under their new names, the readout's folded.

    Args:
        weights: all or some of the original's.
        layout: its names.
        factor: of the readout.
        blocks: how many the model has.
        embedders: names of the parameters that every block gets a copy of.
    """
    for name, tensor in weights.items():
        if name in (_POSITIONS, _NULL_CAPTION):
            continue
        module, dot, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            module, dot, leaf = name, "", ""
        if module == layout.readout and leaf == "weight":
            tensor = (tensor.double() * factor).to(tensor.dtype)
        if module in layout.shared:
            yield f"{layout.shared[module]}{dot}{leaf}", tensor
            continue
        if module in embedders:
            for i in range(blocks):
                yield f"transformer_blocks.{i}.{embedders[module]}{dot}{leaf}", tensor
            continue
        first, _, rest = module.partition(".")
        number, _, inner = rest.partition(".")
        if first != "blocks" or inner not in layout.block:
            raise ValueError(f"{name!r} is no parameter of the original model; is this checkpoint of another kind?")
        new = layout.block[inner]
        names = (new,) if isinstance(new, str) else new
        for part, piece in zip(names, tensor.chunk(len(names))):
            yield f"transformer_blocks.{number}.{part}{dot}{leaf}", piece


def _loaded(model_class: Callable[..., ModelMixin], config: Mapping[str, Any], renamed: Renamed) -> Any:
    """The model with the weights, each of them used."""
    new = {name: tensor.contiguous() for name, tensor in renamed}
    model = model_class(**config)
    own = model.state_dict()
    for name in [*own, *new]:
        got, expected = (tuple(side[name].shape) if name in side else None for side in (new, own))
        if got != expected:
            raise ValueError(f"the checkpoint does not fit: {name} should have shape {expected}, got {got}")
    model.load_state_dict(new)
    return model.to(next(iter(new.values())).dtype)


def _get(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in weights:
        raise ValueError(
            f"the checkpoint has no {name!r}; is it of another kind? It begins with {next(iter(weights))!r}"
        )
    return weights[name]


def _width(weights: Mapping[str, torch.Tensor]) -> int:
    return len(_get(weights, "x_embedder.proj.weight"))


def _shape_config(weights: Mapping[str, torch.Tensor], head_dim: int) -> dict[str, Any]:
    """What the configurations of both models call alike."""
    width, channels, patch, _ = _get(weights, "x_embedder.proj.weight").shape
    mlp = len(_get(weights, "blocks.0.mlp.fc1.weight"))
    if mlp != _MLP_RATIO * width:
        raise ValueError(
            f"the checkpoint's MLPs have {mlp} features, {mlp / width:.4g} times its width {width}; diffusers' model "
            f"has {_MLP_RATIO} times built in and cannot hold them"
        )
    return {
        "num_attention_heads": _heads(width, head_dim),
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": len(_get(weights, "final_layer.linear.bias")) // patch**2,
        "num_layers": _blocks(weights),
        "patch_size": patch,
        "sample_size": _side(weights) * patch,
    }


def _heads(width: int, head_dim: int) -> int:
    if width % head_dim:
        raise ValueError(f"the width {width} is no multiple of the head dimension {head_dim}; give the right one")
    return width // head_dim


def _blocks(weights: Mapping[str, torch.Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)


def _side(weights: Mapping[str, torch.Tensor]) -> int:
    """Patches per side of the training images."""
    return math.isqrt(_get(weights, _POSITIONS).shape[1])


def _positions_scale(weights: Mapping[str, torch.Tensor], width: int, scales: tuple[float, ...]) -> float:
    """The interpolation scale with which diffusers computes the checkpoint's table of positions."""
    table, side = _get(weights, _POSITIONS)[0].float(), _side(weights)
    for scale in scales:
        own = get_2d_sincos_pos_embed(width, side, base_size=side, interpolation_scale=scale, output_type="pt")
        if torch.allclose(own.float(), table, atol=1e-3):
            return scale
    raise ValueError(f"the checkpoint's positions are not the sin-cos table of {side}x{side} patches")
