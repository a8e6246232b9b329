"""MMDiT from and to diffusers' FLUX and SD3 transformers: configurations, and models over the same parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn

from imgdit import compat
from imgdit.mup import MupSettings, configure, mup_settings
from imgdit.naming import nearest

if TYPE_CHECKING:
    from diffusers import ModelMixin


M = TypeVar("M", bound=nn.Module)

_SHARED = (
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)
_FLUX = (*_SHARED, "num_single_layers", "guidance_embeds", "axes_dims_rope")
_SD3 = (*_SHARED, "sample_size", "pos_embed_max_size", "dual_attention_layers", "qk_norm")
# What each architecture fixes among our options.
_FLUX_FIXED: dict[str, Any] = {
    "pos_embed_type": "rope",
    "rope_theta": 10000.0,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (),
    "context_pre_only": False,
    "mlp_ratio": 4.0,
    "timestep_scale": 1000.0,
}
_SD3_FIXED: dict[str, Any] = {
    "pos_embed_type": "sincos",
    "num_single_layers": 0,
    "guidance_embeds": False,
    "context_pre_only": True,
    "mlp_ratio": 4.0,
    "timestep_scale": 1.0,
}


def read_config(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration, from ours or from a diffusers FLUX or SD3 transformer's.

    Raises:
        ValueError: another architecture, or a key that no configuration has.
    """
    config = dict(config)
    name = config.get("_class_name", cls.__name__)
    if name == "FluxTransformer2DModel":
        return {**_FLUX_FIXED, **_pick(config, _FLUX, name), **_mup(config), "_class_name": cls.__name__}
    if name == "SD3Transformer2DModel":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if config.get("caption_projection_dim", width) != width:
            raise ValueError(
                f"caption_projection_dim={config['caption_projection_dim']} differs from the width {width}; "
                "the joint attention of such a model cannot run"
            )
        return {**_SD3_FIXED, **_pick(config, _SD3, name), **_mup(config), "_class_name": cls.__name__}
    if name != cls.__name__:
        raise ValueError(
            f"this folder holds a {name}; {cls.__name__} reads its own, FluxTransformer2DModel and "
            "SD3Transformer2DModel folders"
        )
    known = compat.init_keys(cls)
    unknown = [key for key in config if not key.startswith("_") and key not in known | {"quantization_config"}]
    if unknown:
        raise ValueError(f"unknown configuration key {nearest(unknown[0], known)}")
    return config


def _pick(config: Mapping[str, Any], names: tuple[str, ...], class_name: str) -> dict[str, Any]:
    """The named keys; a missing one has the default of the diffusers class, not ours."""
    import diffusers

    defaults = _defaults(getattr(diffusers, class_name))
    picked = {name: config.get(name, defaults[name]) for name in names}
    if picked.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"qk_norm={picked['qk_norm']!r} is not supported; expected 'rms_norm' or None")
    passed_on = {key: value for key, value in config.items() if key == "quantization_config"}
    return {**picked, **passed_on}


def _mup(config: Mapping[str, Any]) -> dict[str, Any]:
    """The μP fields of a configuration, which a diffusers model has if `imgdit.mup.configure` wrote them."""
    names = (f"mup_{name}" for name in MupSettings._fields)
    return {name: config[name] for name in names if name in config}


def _defaults(cls: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}


def from_diffusers(cls: Any, model: ModelMixin) -> Any:
    """See `MMDiT.from_diffusers`."""
    name = type(model).__name__
    if name not in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        raise ValueError(f"from_diffusers takes a FluxTransformer2DModel or SD3Transformer2DModel, got {name}")
    config = read_config(cls, {**model.config, "_class_name": name})
    with torch.device("meta"):
        ours = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
    return _share(model, ours)


def to_diffusers(model: Any) -> ModelMixin:
    """See `MMDiT.to_diffusers`."""
    import diffusers

    config = dict(model.config)
    if config["context_pre_only"] is None:
        config["context_pre_only"] = config["num_single_layers"] == 0
    rotary = config["pos_embed_type"] == "rope"
    fixed, names = (_FLUX_FIXED, _FLUX) if rotary else (_SD3_FIXED, _SD3)
    target = diffusers.FluxTransformer2DModel if rotary else diffusers.SD3Transformer2DModel
    for key, value in fixed.items():
        if _plain(config[key]) != _plain(value):
            raise ValueError(f"{target.__name__} has {key}={value!r} built in, this model has {config[key]!r}")
    kwargs = {name: config[name] for name in names}
    if not rotary:
        kwargs["caption_projection_dim"] = model.inner_dim
        kwargs["out_channels"] = model.out_channels
    with torch.device("meta"):
        theirs = target(**kwargs)
    settings = mup_settings(model.config)
    if settings != MupSettings():
        configure(theirs, **settings._asdict())
    return _share(model, theirs)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _share(source: nn.Module, target: M) -> M:
    """Put the parameters and buffers of `source` into `target`, which has the same names."""
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    names = {*dict(target.named_parameters()), *dict(target.named_buffers())}
    if theirs.keys() != names:
        odd = sorted(theirs.keys() ^ names)
        raise ValueError(
            f"the modules of {type(source).__name__} do not have their original parameters: {odd[0]} and "
            f"{len(odd) - 1} more differ; unload LoRAs, unfuse projections and remove hooks that add modules first"
        )
    for name, tensor in theirs.items():
        owner, _, leaf = name.rpartition(".")
        module = target.get_submodule(owner)
        compat.put_tensor(module, leaf, tensor)
    target.train(source.training)
    return target
