"""Roles of parameters under μP, and the initialisation and multipliers that follow from them.

m = width / base width, om = output multiplier. Three factors that μP puts into the forward pass are folded into the
parameters that they multiply, so the forward pass stays the plain one and a μP checkpoint runs in any plain model:

| of | factor | folded into |
|---|---|---|
| the readout | om / m | its weight |
| the attention's logits | sqrt(base head dim / head dim): 1 / head dim in all | the queries' gains or projections |
| a residual branch | base depth / depth (CompleteP, arXiv 2505.01618) | the last parameters of the branch |

A parameter that holds f times its factor-free value trains exactly as that one does if Adam's learning rate is
multiplied by f, and its weight decay and epsilon by 1 / f. (Tensor Programs V, arXiv 2203.03466, table 8 and appendix
B; applied to diffusion transformers in arXiv 2505.15270, theorem 3.1.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from imgdit.mup.structure import Kind, Role, Structure, bare_model, matches, plain_name, structure_of
from imgdit.naming import check_choice

Parametrisation = Literal["mup", "standard"]
"""What may be compared: μP, or one learning rate for all parameters."""


class MupSettings(NamedTuple):
    """The μP fields of a model's configuration, there with the prefix `mup_`."""

    base_width: int | None = None
    """Width at which learning rates were tuned; `None`: standard parametrisation."""
    output_mult: float = 1.0
    """Factor of the readout."""
    adaln_init: str = "zero"
    """Initialisation of the modulation: "zero" (adaLN-zero) or "normal" (as the μP paper's DiT)."""
    wd_exponent: float = 1.0
    """Weight decay of hidden matrices grows as m to this power. 1: the same decay per step at every width (`mup`'s
    default; "independent" of the learning rate); 0.5: arXiv 2510.15262; 0: torch's AdamW, whose decay per step falls
    with the learning rate."""
    base_head_dim: int | None = None
    """Head dimension at which learning rates were tuned; `None`: it does not grow."""
    base_depth: int | None = None
    """Blocks at which learning rates were tuned; `None`: the depth does not grow."""


class ParameterRule(NamedTuple):
    """How one parameter is initialised and trained."""

    name: str
    """Its name in the model, without those of wrappers."""
    role: Role
    """input: grows in one dimension, the outgoing; hidden and modulation: in both; output: in the incoming;
    vector: a bias or gain of the width; finite: in none; adapter: a LoRA's, left alone."""
    shape: tuple[int, ...]
    init_std: float | None
    """Standard deviation of its normal initialisation; 0 for zeros, `None` for a gain."""
    lr_mult: float
    """Factor on the base learning rate of an Adam-like optimiser."""
    wd_mult: float
    """Factor on the weight decay of AdamW."""
    eps_mult: float
    """Factor on Adam's epsilon."""
    fold: float = 1.0
    """Factor of the forward pass that the parameter holds; a gain starts at it. Part of the other columns."""
    growth: float = 1.0
    """How much its growing dimension (the incoming of two) has grown since the base; 1 if none grows."""


_MATRICES: tuple[Role, ...] = ("input", "hidden", "modulation", "output")
"""Roles of parameters of two dimensions and more."""


class MupMixin:
    """μP for a model whose class `imgdit.mup.structure` knows, or that declares `_mup_structure`."""

    def mup_table(self) -> list[ParameterRule]:
        """One rule per parameter, in the model's order."""
        return mup_table(self)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training from scratch; see `imgdit.mup.init_weights`."""
        init_weights(self, generator)


def mup_settings(config: Mapping[str, Any]) -> MupSettings:
    """The μP fields of a configuration; a model class without them has the defaults."""
    return MupSettings(**{name: config.get(f"mup_{name}", MupSettings._field_defaults[name]) for name in _FIELDS})


_FIELDS = MupSettings._fields


def configure(model: Any, **settings: Any) -> None:
    """Write μP fields into the configuration of a model, such as one of diffusers that has none.

    They are saved with it, copied with it and read back by `from_pretrained`. The forward pass and the weights stay:
    call `init_weights` to train from scratch. On pretrained weights the learning rates are scaled as if the model had
    been initialised under μP, so transfer is not guaranteed.

    Args:
        model: of any known class.
        settings: fields of `MupSettings`.

    Raises:
        ValueError: a model of unknown structure, or values that do not fit it.
    """
    model = bare_model(model)
    structure = structure_of(model)
    changed = mup_settings(model.config)._replace(**settings)
    check_settings(changed, structure.head_dim_of(model.config), structure.head_dim_name)
    model.register_to_config(**{f"mup_{name}": value for name, value in changed._asdict().items()})


def check_settings(settings: MupSettings, head_dim: int, head_dim_name: str = "attention_head_dim") -> None:
    """Refuse μP fields that do not fit a model.

    Args:
        settings: the fields.
        head_dim: features of an attention head.
        head_dim_name: what its configuration calls that.

    Raises:
        ValueError: what was got and expected.
    """
    base, base_head_dim = settings.base_width, settings.base_head_dim
    check_choice("mup_adaln_init", settings.adaln_init, ("zero", "normal"))
    for name in ("base_head_dim", "base_depth", "output_mult"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"mup_{name} must be positive, got {value}")
    if base is None:
        return
    of = head_dim_name if base_head_dim is None else "mup_base_head_dim"
    step = base_head_dim or head_dim
    if base < step or base % step:
        raise ValueError(
            f"mup_base_width must be a multiple of {of}={step} (widths grow by whole heads), got {base}; the nearest "
            f"is {max(round(base / step), 1) * step}"
        )


def width_multiplier(model: Any) -> float:
    """m: how much wider than the base the model is; 1 under the standard parametrisation."""
    model = bare_model(model)
    base = mup_settings(model.config).base_width
    return 1.0 if base is None else structure_of(model).width_of(model.config) / base


def mup_table(model: Any) -> list[ParameterRule]:
    """One rule per parameter, in the model's order; the multipliers are those of Adam (see `param_groups`).

    Raises:
        ValueError: a model of unknown structure, or a parameter that no pattern matches.
    """
    model = bare_model(model)
    structure, config = structure_of(model), model.config
    settings = mup_settings(config)
    named = [(plain_name(name), tuple(p.shape)) for name, p in model.named_parameters()]
    queries = next((q for q in structure.queries if any(matches(name, q) for name, _ in named)), ())
    m = width_multiplier(model)
    head_dim = structure.head_dim_of(config)
    head_growth = head_dim / (settings.base_head_dim or head_dim)
    depth = structure.depth_of(config)
    depth_growth = depth / (settings.base_depth or depth)
    rules = []
    for name, shape in named:
        kind, std = _kind(model, structure, name)
        if kind == "adapter":
            rules.append(ParameterRule(name, kind, shape, None, 1.0, 1.0, 1.0))
            continue
        growth = _capped(structure, settings, config) if matches(name, structure.capped) else m
        growth = {"finite": 1.0, "head": head_growth, "heads": m / head_growth}.get(kind, growth)
        role: Role
        if kind == "head" and settings.base_head_dim is None:
            role = "finite"
        elif kind == "head" or kind == "heads":
            role = "vector"
        else:
            role = kind
        fold = settings.output_mult / m if role == "output" else 1.0
        if matches(name, queries):
            fold /= math.sqrt(head_growth)
        if matches(name, structure.branches):
            fold /= depth_growth
        # A branch's gradients fall with its factor (CompleteP).
        eps = 1 / depth_growth if matches(name, structure.blocks) else 1.0
        matrix = growth if role in ("hidden", "modulation") else 1.0
        init = _init_std(name, role, shape, std, settings)
        rules.append(
            ParameterRule(
                name,
                role,
                shape,
                init_std=None if init is None else init * fold,
                lr_mult=fold / matrix,
                wd_mult=matrix**settings.wd_exponent / fold,
                eps_mult=eps / fold,
                fold=fold,
                growth=growth,
            )
        )
    return rules


def _kind(model: Any, structure: Structure, name: str) -> tuple[Kind, float | None]:
    try:
        return structure.kind(name)
    except KeyError:
        if name.endswith("_flat_param"):
            raise ValueError(
                "FSDP1 has joined the parameters into flat ones, which have no roles; wrap the model with "
                "use_orig_params=True, or make the parameter groups before"
            ) from None
        raise ValueError(
            f"no μP role matches the parameter {name!r} of {type(model).__name__}; add a pattern for it to the "
            "class's Structure (imgdit/mup/structure.py)"
        ) from None


def _capped(structure: Structure, settings: MupSettings, config: Mapping[str, Any]) -> float:
    """Growth of a width that ends at the structure's cap."""
    if settings.base_width is None:
        return 1.0
    return min(structure.width_of(config), structure.cap) / min(settings.base_width, structure.cap)


def _init_std(name: str, role: Role, shape: tuple[int, ...], std: float | None, settings: MupSettings) -> float | None:
    if len(shape) == 1:
        return None if name.endswith(".weight") else 0.0
    if role == "output" or (role == "modulation" and settings.adaln_init == "zero"):
        return 0.0
    return 1 / math.sqrt(math.prod(shape[1:])) if std is None else std


@torch.no_grad()
def init_weights(model: Any, generator: torch.Generator | None = None) -> None:
    """Initialise every parameter by its role; buffers, the sin-cos table and adapters stay.

    | role | weights | note |
    |---|---|---|
    | input | normal, fan_in^-1/2 | fan_in: features of one row; 1 for a table of classes; PixArt's shifts: 0.02 |
    | hidden | normal, fan_in^-1/2 | independent of the base width |
    | modulation | zeros, or as hidden | `mup_adaln_init`: adaLN-zero, or the μP paper's DiT |
    | output | zeros | the model predicts 0 at first |
    | vector, finite | biases zeros, gains ones | |

    All of it times the rule's `fold`, which is 1 unless a head dimension or a depth grows. Where a model adds 1 to its
    gains, their parameters are less by 1.

    Args:
        model: of a known class; sharded (FSDP2) or not, the same generator draws the same weights.
        generator: source of the draws, on the parameters' device.

    Raises:
        ValueError: a model of unknown structure, or one that FSDP1 has cut into shards.
    """
    less_one = structure_of(bare_model(model)).less_one
    for rule, parameter in zip(mup_table(model), model.parameters(), strict=True):
        if rule.role == "adapter":
            continue
        if rule.role in _MATRICES and len(rule.shape) < 2:
            raise ValueError(
                f"{rule.name} is a flat shard {rule.shape} of FSDP1, from which its fan-in cannot be told; initialise "
                "the model before it is wrapped"
            )
        if rule.init_std is None:
            parameter.fill_(rule.fold - 1.0 if matches(rule.name, less_one) else rule.fold)
        elif rule.init_std == 0.0:
            parameter.zero_()
        elif isinstance(parameter, DTensor):
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            whole.normal_(0.0, rule.init_std, generator=generator)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
        else:
            parameter.normal_(0.0, rule.init_std, generator=generator)
