"""What a denoiser is recognised by: its class, the size of its architecture, and a few of its weights.

A hash of the bytes would call the same model in bfloat16 another one. Names and sizes are those of the architecture
that the configuration describes, so that fused projections and adapters do not count; a text head does not count
either, which may be added to a model that generates images. A weight that is quantised, or lies on a disk, is left out
of the comparison.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from diffusers import ConfigMixin

from imgdit import compat
from imgdit.models.text_head import HEAD

SKETCH = 64
"""Weights of a model that are compared to tell it from another."""
_WRAPPERS = re.compile(r"\.base_layer\b|\b_orig_mod\.")
"""Parts of a parameter's name that PEFT and `torch.compile` put in."""

Shapes = Mapping[str, tuple[int, ...]]


def model_fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Class, number of weights, and a sketch: 64 weights, `None` for those that cannot be read as they were."""
    model = compat.unwrapped(model)
    return _fingerprint(model, _without_text_head(_architecture_of(model) or _shapes(model)))


def is_fingerprint_of(known: Mapping[str, Any], model: torch.nn.Module) -> bool:
    """Whether a model is the one that a fingerprint was taken of, up to half precision and quantisation.

    Fingerprints of earlier versions were taken of the weights as they stood, adapters aside, or with a text head.
    """
    model = compat.unwrapped(model)
    if same_model(known, model_fingerprint(model)) or same_model(known, _fingerprint(model, _shapes(model))):
        return True
    architecture = _architecture_of(model)
    return architecture is not None and same_model(known, _fingerprint(model, architecture))


def _without_text_head(shapes: Shapes) -> Shapes:
    if HEAD[0] not in shapes:  # models without one have other parts of such names
        return shapes
    return {name: shape for name, shape in shapes.items() if name not in HEAD}


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same weights, up to half precision, as far as both have them."""
    if (one["class"], one["parameters"]) != (other["class"], other["parameters"]):
        return False
    if len(one["sketch"]) != len(other["sketch"]):  # of an earlier version, of an offloaded model
        return True
    pairs = [(a, b) for a, b in zip(one["sketch"], other["sketch"]) if a is not None and b is not None]
    return all(math.isclose(a, b, rel_tol=2**-7, abs_tol=2**-20) for a, b in pairs)


@torch.no_grad()
def _fingerprint(model: torch.nn.Module, shapes: Shapes) -> dict[str, Any]:
    names = sorted(shapes)
    picked = [names[i * len(names) // SKETCH] for i in range(SKETCH)]
    there = {_WRAPPERS.sub("", name): name for name, _ in model.named_parameters()}
    on_disk = compat.parameters_on_disk(model)
    return {
        "class": type(model).__name__,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "sketch": [_weight(model, there.get(name), shapes[name], i * 7919, on_disk) for i, name in enumerate(picked)],
    }


def _weight(
    model: torch.nn.Module, name: str | None, shape: tuple[int, ...], place: int, on_disk: set[int]
) -> float | None:
    """An entry of a parameter, by its place in the flattened one; `None` where it is not there as a plain number."""
    if name is None:
        return None
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    offloaded = getattr(owner, leaf).device.type == "meta"
    with align_module_device(owner, torch.device("cpu")) if offloaded else nullcontext():
        parameter = getattr(owner, leaf)
        plain = type(parameter) is torch.nn.Parameter and parameter.dtype in _PLAIN and id(parameter) not in on_disk
        if not plain or tuple(parameter.shape) != shape or parameter.device.type == "meta":
            return None
        where = torch.unravel_index(torch.tensor(place % parameter.numel()), shape)
        return float(parameter.detach()[tuple(map(int, where))])


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Number types that hold what was trained; of 8 bits and less, too little is left."""


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters as they stand, but for adapters' and scalars."""
    return {
        _WRAPPERS.sub("", name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if "lora_" not in name and parameter.ndim
    }


def _architecture_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model that a configuration describes; `None` where none can be made of it."""
    if not isinstance(model, ConfigMixin):
        return None
    kind: Any = type(model)
    taken = inspect.signature(kind.__init__).parameters
    config = {name: value for name, value in dict(model.config).items() if name in taken}
    return _architecture(kind, json.dumps(config, sort_keys=True, default=str))


@functools.lru_cache(maxsize=16)
def _architecture(kind: Any, config: str) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"):
            return _shapes(kind(**json.loads(config)))
    except Exception:  # whatever a class does that has no weights yet: the model is then taken as it stands
        return None
