"""The names that FLUX LoRA files use, to diffusers' names and back.

peft     `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`: diffusers, OminiControl, ours
comfyui  `diffusion_model.single_blocks.0.linear1.lora_A.weight`: the names of FLUX's own repository
kohya    `lora_unet_single_blocks_0_linear1.lora_down.weight`: the same with underscores

FLUX's own names fuse projections that diffusers keeps apart: a fused LoRA is the parts' down-projections above each
other and their up-projections on a block diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .naming import check_name

DIALECTS = ("peft", "comfyui", "kohya")
_MLP_RATIO = 4  # FLUX.1: where a file has no LoRA for the MLP, its rows are still there in the fused layer

# FLUX's own name of a layer in a block, and diffusers' names of its parts in the order of their rows.
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_ROOT = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_SWAPPED = "norm_out.linear"  # diffusers keeps scale before shift here, FLUX shift before scale


class LoraPair(NamedTuple):
    """One module's LoRA; its change of the weights is `up @ down`."""

    down: torch.Tensor
    """A: (rank, in, ...)"""
    up: torch.Tensor
    """B: (out, rank, ...)"""


class LoraShapeError(ValueError):
    """Tensors that cannot be a LoRA; names the module."""


class Renamed(NamedTuple):
    """A file's tensors under diffusers' names."""

    pairs: dict[str, LoraPair]
    """By module, as `transformer_blocks.0.attn.to_q`; the file's alphas are multiplied into `up`."""
    dialect: str
    unused: tuple[str, ...]
    """Keys that are no part of a LoRA of the transformer, or of half a LoRA."""


_KEY = re.compile(
    r"(?P<prefix>transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)(?P<module>.+?)"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|lora_down\.weight|lora_up\.weight|alpha)"
)
_PARTS = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}


def to_diffusers(tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float] | None = None) -> Renamed:
    """Read any of the dialects.

    Args:
        tensors: as in the file.
        scales: factor of each module, from a file's PEFT configuration; `alpha` keys of the file take its place.

    Raises:
        LoraShapeError: a pair whose shapes do not fit each other, or the layer that its name says.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unused, prefixes = [], set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = None if match is None else _plain_name(match["prefix"], match["module"])
        if match is None or module is None:
            unused.append(key)
            continue
        prefixes.add(match["prefix"])
        found.setdefault(module, {})[_PARTS.get(match["part"], "alpha")] = tensor
        keys.setdefault(module, []).append(key)
    dialect = "kohya" if "lora_unet_" in prefixes else "comfyui" if "diffusion_model." in prefixes else "peft"
    pairs: dict[str, LoraPair] = {}
    for module, parts in found.items():
        if "down" not in parts or "up" not in parts:
            unused += keys[module]
            continue
        down, up = _checked(module, parts)
        factor = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else (scales or {}).get(module, 1.0)
        pairs |= _split(module, LoraPair(down, up if factor == 1.0 else up * factor))
    return Renamed(pairs, dialect, tuple(sorted(unused)))


DIALECTS = ("peft", "comfyui")
"""Names that a file can be written by."""


def from_diffusers(pairs: Mapping[str, LoraPair], dialect: str) -> dict[str, torch.Tensor]:
    """Tensors of a file, by the names of `dialect`; the inverse of `to_diffusers`."""
    check_name("dialect", dialect, DIALECTS)
    if dialect == "peft":
        return _named("transformer.", pairs)
    left = dict(pairs)
    fused: dict[str, LoraPair] = {}
    for name in pairs:
        if name not in left:
            continue
        native, parts = _native(name)
        fused[native] = _fuse([left.pop(part, None) for part in parts], parts)
    return _named("diffusion_model.", fused)


def _checked(module: str, parts: Mapping[str, torch.Tensor]) -> LoraPair:
    """A pair that fits, in a type that can be computed with."""
    down, up = parts["down"], parts["up"]
    if not (down.is_floating_point() and up.is_floating_point()):
        raise LoraShapeError(f"{module} has {down.dtype} and {up.dtype}; expected floating-point numbers")
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0] or not (down.numel() and up.numel()):
        raise LoraShapeError(
            f"{module} is {tuple(down.shape)} and {tuple(up.shape)}; expected (rank, in, …) and (out, rank, …)"
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise LoraShapeError(f"the alpha of {module} has shape {tuple(parts['alpha'].shape)}; expected one number")
    small = torch.bfloat16  # which holds every 8-bit float, and has the operations that those lack
    return LoraPair(*(t.to(small) if t.itemsize == 1 else t for t in (down, up)))


def _named(prefix: str, pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = pair.up.contiguous()
    return tensors


def _plain_name(prefix: str, module: str) -> str | None:
    """A module's name with dots; `None` for an underscored name that FLUX does not have."""
    if prefix != "lora_unet_":
        return module
    match = re.fullmatch(r"(double|single)_blocks_(\d+)_(.+)", module)
    table = _ROOT if match is None else _DOUBLE if match[1] == "double" else _SINGLE
    inner = next((name for name in table if name.replace(".", "_") == (match[3] if match else module)), None)
    if inner is None or match is None:
        return inner
    return f"{match[1]}_blocks.{match[2]}.{inner}"


def _split(module: str, pair: LoraPair) -> dict[str, LoraPair]:
    """The parts of a LoRA under FLUX's own name; any other name is diffusers' already."""
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    table = _ROOT if match is None else _DOUBLE if match[1] == "double" else _SINGLE
    inner = match[3] if match else module
    if inner not in table:
        return {module: pair}
    prefix = "" if match is None else {"double": "", "single": "single_"}[match[1]] + f"transformer_blocks.{match[2]}."
    parts = table[inner]
    if len(parts) == 1:
        up = torch.cat(pair.up.chunk(2)[::-1]) if parts[0] == _SWAPPED else pair.up
        return {prefix + parts[0]: LoraPair(pair.down, up)}
    width = pair.down.shape[1]
    rest = pair.up.shape[0] - 3 * width
    if rest < 0 or (rest > 0) != (len(parts) > 3):
        raise LoraShapeError(f"{module} has {pair.up.shape[0]} rows, which are no {', '.join(parts)} of width {width}")
    rows = [width] * 3 + [rest] * (len(parts) - 3)
    split = {}
    for part, up in zip(parts, pair.up.split(rows)):
        used = up.any(dim=0)  # a LoRA of another part has nothing here
        if used.any():
            split[prefix + part] = LoraPair(pair.down[used], up[:, used])
    return split


def _native(name: str) -> tuple[str, tuple[str, ...]]:
    """FLUX's own name of the layer that holds a module, and diffusers' names of the layer's parts."""
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    table = _ROOT if match is None else _SINGLE if match[1] else _DOUBLE
    inner = match[3] if match else name
    for native, parts in table.items():
        if inner in parts:
            if match is None:
                return native, parts
            prefix = f"{match[1] or ''}transformer_blocks.{match[2]}."
            block = f"{'single' if match[1] else 'double'}_blocks.{match[2]}."
            return block + native, tuple(prefix + part for part in parts)
    raise ValueError(f"{name!r} has no name in FLUX's own repository; only LoRAs for FLUX can be written as 'comfyui'")


def _fuse(pairs: list[LoraPair | None], parts: tuple[str, ...]) -> LoraPair:
    present = [pair for pair in pairs if pair is not None]
    if len(parts) == 1:
        (down, up) = present[0]
        return LoraPair(down, torch.cat(up.chunk(2)[::-1]) if parts[0] == _SWAPPED else up)
    down = torch.cat([pair.down for pair in present])  # (sum of ranks, in)
    width, blocks, rank = down.shape[1], [], 0
    for pair, name in zip(pairs, parts):
        rows = width * (_MLP_RATIO if name.endswith("proj_mlp") else 1)
        up = down.new_zeros(rows if pair is None else pair.up.shape[0], down.shape[0])
        if pair is not None:
            up[:, rank : rank + pair.up.shape[1]] = pair.up
            rank += pair.up.shape[1]
        blocks.append(up)
    return LoraPair(down, torch.cat(blocks))
