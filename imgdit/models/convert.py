"""MMDiT from and to diffusers' FLUX and SD3 transformers: configurations, and models over the same parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn as nn

from imgdit import compat
from imgdit.family import AsMMDiT, families, family_named, known_classes
from imgdit.mup import MupSettings, configure, mup_settings
from imgdit.naming import nearest

if TYPE_CHECKING:
    from diffusers import ModelMixin


M = TypeVar("M", bound=nn.Module)


_IN_ITS_OWN_CLASS = ". Recipes train it in its own class: model.kind: transformer"


def read_config(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration, from ours or from a diffusers FLUX or SD3 transformer's.

    Raises:
        ValueError: another architecture, or a key that no configuration has.
    """
    config = dict(config)
    name = config.get("_class_name", cls.__name__)
    if name != cls.__name__:
        as_mmdit = _as_mmdit(name)
        if as_mmdit is None:
            raise ValueError(
                f"this folder holds a {name}; {cls.__name__} reads its own, {' and '.join(known_classes('as_mmdit'))} "
                f"folders{_IN_ITS_OWN_CLASS if name in known_classes('training') else ''}"
            )
        if as_mmdit.check is not None:
            as_mmdit.check(config)
        picked = _pick(config, as_mmdit.names, as_mmdit.defaults_of or name) | _renamed(config, as_mmdit, name)
        return {**as_mmdit.fixed, **picked, **_mup(config), "_class_name": cls.__name__}
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


def _renamed(config: Mapping[str, Any], as_mmdit: AsMMDiT, class_name: str) -> dict[str, Any]:
    """Settings that have another name in the class."""
    missing = [theirs for theirs in as_mmdit.renamed.values() if theirs not in config]
    if missing:
        raise ValueError(f"the configuration of this {class_name} has no {missing[0]!r}; its folder is not complete")
    return {ours: config[theirs] for ours, theirs in as_mmdit.renamed.items()}


def our_names() -> dict[str, str]:
    """What names of parameters begin with in folders that `MMDiT` reads, and what they begin with in it."""
    known = [family.as_mmdit for family in families() if family.as_mmdit is not None]
    return {theirs: ours for as_mmdit in known for theirs, ours in as_mmdit.weights.items()}


def _mup(config: Mapping[str, Any]) -> dict[str, Any]:
    """The μP fields of a configuration, which a diffusers model has if `imgdit.mup.configure` wrote them."""
    names = (f"mup_{name}" for name in MupSettings._fields)
    return {name: config[name] for name in names if name in config}


def _defaults(cls: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}


def from_diffusers(cls: Any, model: ModelMixin) -> Any:
    """See `MMDiT.from_diffusers`."""
    name = type(model).__name__
    if _as_mmdit(name) is None:
        taken = [cls for family in _of_diffusers() for cls in family.classes]
        raise ValueError(f"from_diffusers takes a {' or '.join(taken)}, got {name}")
    config = read_config(cls, {**model.config, "_class_name": name})
    with torch.device("meta"):
        ours = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
    return _with_weights_of(model, ours)


def to_diffusers(model: Any) -> ModelMixin:
    """See `MMDiT.to_diffusers`."""
    import diffusers

    config = dict(model.config)
    if config["context_pre_only"] is None:
        config["context_pre_only"] = config["num_single_layers"] == 0
    if config["text_vocab_size"] is not None or config["pooled_projection_dim"] is None:
        raise ValueError("FLUX.1 and SD3 of diffusers have pooled text and no text head, this model differs in that")
    name, as_mmdit = _target(config["pos_embed_type"])
    target = getattr(diffusers, name)
    for key, value in as_mmdit.fixed.items():
        if _plain(config[key]) != _plain(value):
            raise ValueError(f"{target.__name__} has {key}={value!r} built in, this model has {config[key]!r}")
    kwargs = {name: config[name] for name in as_mmdit.names}
    if as_mmdit.added is not None:
        kwargs |= as_mmdit.added(model)
    with torch.device("meta"):
        theirs = target(**kwargs)
    settings = mup_settings(model.config)
    if settings != MupSettings():
        configure(theirs, **settings._asdict())
    return _with_weights_of(model, theirs)


def _as_mmdit(name: str) -> AsMMDiT | None:
    family = family_named(name)
    return None if family is None else family.as_mmdit


def _of_diffusers() -> list[Any]:
    """Families of diffusers' classes that are an `MMDiT`."""
    return [f for f in families() if f.as_mmdit is not None and f.as_mmdit.defaults_of is None]


def _target(positions: str) -> tuple[str, AsMMDiT]:
    """The class of diffusers whose positions are of a kind."""
    for family in _of_diffusers():
        if family.as_mmdit.fixed["pos_embed_type"] == positions:
            return family.classes[0], family.as_mmdit
    raise ValueError(f"no class of diffusers has pos_embed_type={positions!r}")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _with_weights_of(source: nn.Module, target: M) -> M:
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
