"""A LoRA and a model that may not be its own: which modules fit, in which shape and type, and what is near others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from imgdit.family import find_family
from imgdit.lora.dialects import CONTROL, PREFIXES, LoraPair
from imgdit.lora.guess import families_of, family_of
from imgdit.naming import closest


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Every layer that can have a LoRA."""
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if re.search(r"\.(base_layer|lora_[AB])(\.|$)", name):
            continue
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Conv2d) or hasattr(layer, "in_features"):
            layers[name] = layer
    return layers


def _shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a layer. From its attributes: quantised weights are packed."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels * math.prod(layer.kernel_size)
    return layer.out_features, layer.in_features


_BY_CHANNELS = (
    "reads its condition as further channels of the latents, which needs a wider model and a pipeline of its own; "
    "OmniControl takes LoRAs that read a condition as tokens"
)


def fitted(
    found: Mapping[str, LoraPair], source: str, model: nn.Module, layers: Mapping[str, Any]
) -> tuple[dict[str, LoraPair], list[str]]:
    """The LoRAs of modules that the model has, in their shape, and the names of the others.

    Raises:
        ValueError: the file is for another model.
    """
    known = find_family(model)
    names = None if known is None else known.lora
    ratios = {name: pair.up.shape[0] / pair.down.shape[1] for name, pair in found.items()}
    family, own = family_of(found, ratios), (names.label if names is not None and names.label else family_of(layers))
    of_file = f"; the file has the names of {family}" if family else ""
    families = f"{of_file}; the model is a {type(model).__name__}" + (f" ({own})" if own else "")
    for name in () if names is None else names.inputs:
        if name in found and name in layers:
            channels, ours = math.prod(found[name].down.shape[1:]), _shape(layers[name])
            if found[name].up.shape[0] == ours[0] and channels > ours[1]:
                kind = CONTROL if own == "FLUX.1" else _BY_CHANNELS
                raise ValueError(f"{source} {kind} (its {name} reads {channels} channels, the model's {ours[1]})")
    pairs: dict[str, LoraPair] = {}
    for name, pair in found.items():
        if name not in layers:
            continue
        theirs, ours = (pair.up.shape[0], math.prod(pair.down.shape[1:])), _shape(layers[name])
        if theirs != ours:
            raise ValueError(
                f"{source} is for another base model: its {name} is {theirs[0]}x{theirs[1]} (out x in), this "
                f"model's is {ours[0]}x{ours[1]}{families}"
            )
        pairs[name] = _shaped(pair, layers[name])
    missing = [name for name in found if name not in pairs]
    labels = [one.label for one in families_of(found, ratios)] or ([family] if family else [])
    fits = not labels or own is None or bool({own, *(() if names is None else names.also)} & set(labels))
    if not pairs or not fits:
        name = next(iter(missing or found))
        out, columns = found[name].up.shape[0], math.prod(found[name].down.shape[1:])
        ((_, near),) = nearest_modules([name], layers)
        raise ValueError(
            f"{source} is for another base model: this one has no module {name!r} ({out}x{columns}, out x in; nearest "
            f"is {near!r}){families}"
        )
    return pairs, missing


def _shaped(pair: LoraPair, layer: Any) -> LoraPair:
    """Down- and up-projection with as many dimensions as the layer's weight; trainers write either."""
    down, up = pair
    if isinstance(layer, nn.Conv2d):
        kernel = (layer.in_channels, *layer.kernel_size)
        return LoraPair(down.reshape(-1, *kernel), up.reshape(*up.shape[:2], 1, 1))
    return LoraPair(down.flatten(1), up.flatten(1))


def check_hotswap(model: nn.Module, adapter: str, pairs: Mapping[str, LoraPair]) -> None:
    """Refuse to swap in a LoRA of layers that the adapter does not have, or while it is fused."""
    having = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    strange = [name for name in pairs if name not in having]
    if strange:
        raise ValueError(
            f"hotswap=True fills the layers of {adapter!r} anew, and {strange[0]!r} is none of them; load the file "
            "under another name"
        )
    if any(adapter in module.merged_adapters for module in having.values()):
        raise ValueError(f"adapter {adapter!r} is fused into the base weights; call unfuse_lora() first")
    if any(weight.is_meta for weight in lora_weights(model).values()):
        raise ValueError(
            "sequential offloading keeps the adapters' weights elsewhere, where they cannot be swapped; load the file "
            "under another name, or offload by enable_model_cpu_offload()"
        )


def lora_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of all adapters, by the parameter's name."""
    return {name: weight for name, weight in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def keep_precision(model: Any, adapter: str, state: Mapping[str, torch.Tensor]) -> None:
    """PEFT gives an adapter the type of the base weights. Where those are stored in 8 bits, which have no products, it
    has the type that is computed in.

    Args:
        state: the adapter's tensors by diffusers' names.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        for side, layers in (("A", module.lora_A), ("B", module.lora_B)):
            weight = layers[adapter].weight
            if weight.itemsize == 1:
                tensor = state[f"transformer.{name}.lora_{side}.weight"]
                exact = torch.zeros_like(weight, dtype=model.dtype)  # larger where ranks are padded for hot-swapping
                exact[tuple(slice(length) for length in tensor.shape)] = tensor
                weight.data = exact


def nearest_modules(keys: Sequence[str], modules: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Each key with the nearest module. Blocks differ in their numbers only, so one of each kind is compared."""
    known = set(modules)
    kinds = {_NUMBER.sub(".*.", name): name for name in sorted(known, reverse=True)}
    nearest_kind: dict[str, str] = {}
    found = []
    for key in keys:
        name = re.sub(r"\.(lora_|alpha).*", "", PREFIXES.sub("", key, count=1))
        kind = _NUMBER.sub(".*.", name)
        if kind not in nearest_kind:
            nearest_kind[kind] = closest(kind, kinds) or ""
        near = nearest_kind[kind]
        numbered = near.replace(".*.", "{}").format(*_NUMBER.findall(name)) if _fits(near, name) else ""
        found.append((key, numbered if numbered in known else kinds.get(near, "none")))
    return tuple(found)


_NUMBER = re.compile(r"\.\d+\.")


def _fits(kind: str, name: str) -> bool:
    return kind.count(".*.") == len(_NUMBER.findall(name))
