"""Roles of parameters under μP, and what follows from them: initialisation and optimiser groups.

m = width / base width, om = output multiplier. Widths grow by heads at a fixed head size, so attention keeps
1 / sqrt(head size) and the forward pass needs no change: the readout's factor om / m is folded into its learning
rate, weight decay and Adam's epsilon, which is exact (Tensor Programs V, arXiv 2203.03466, table 8 and appendix B;
applied to diffusion transformers in arXiv 2505.15270, theorem 3.1).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch

Role = Literal["input", "hidden", "modulation", "output", "vector", "finite"]

# Wrappers put their names into a parameter's; roles are matched without them.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_NO_DECAY: tuple[Role, ...] = ("vector", "finite")


class ParameterRule(NamedTuple):
    """How one parameter is initialised and trained."""

    name: str
    """Its name in the model."""
    role: Role
    """input: grows in one dimension, the outgoing; hidden and modulation: in both; output: in the incoming;
    vector: a bias or gain of the width; finite: in none."""
    shape: tuple[int, ...]
    init_std: float | None
    """Standard deviation of its normal initialisation; 0 for zeros, `None` for a gain (ones)."""
    lr_mult: float
    """Factor on the base learning rate of an Adam-like optimiser."""
    wd_mult: float
    """Factor on the weight decay of AdamW, so that lr * decay is the same at every width."""
    eps_mult: float
    """Factor on Adam's epsilon."""


class MupMixin:
    """μP for a model that declares `_mup_roles` and has `mup_base_width`, `mup_output_mult` in its config."""

    _mup_roles: tuple[tuple[str, Role], ...]

    def mup_table(self) -> list[ParameterRule]:
        """One rule per parameter, in the model's order."""
        return mup_table(self)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training from scratch; see `imgdit.mup.init_weights`."""
        init_weights(self, generator)


def width_multiplier(model: Any) -> float:
    """m: how much wider than the base the model is; 1 under the standard parametrisation."""
    config: Any = model.config
    base = config.mup_base_width
    return 1.0 if base is None else config.num_attention_heads * config.attention_head_dim / base


def mup_table(model: Any) -> list[ParameterRule]:
    """One rule per parameter.

    Raises:
        ValueError: a parameter that no pattern of `_mup_roles` matches.
    """
    m, om = width_multiplier(model), float(model.config.mup_output_mult)
    rules = []
    for name, parameter in model.named_parameters():
        name = _unwrapped(name)
        role = _role(model, name)
        lr = wd = eps = 1.0
        if role in ("hidden", "modulation"):
            lr, wd = 1 / m, m
        elif role == "output":
            lr, wd, eps = om / m, m / om, m / om
        rules.append(
            ParameterRule(name, role, tuple(parameter.shape), _init_std(model, name, role, parameter), lr, wd, eps)
        )
    return rules


def _init_std(model: Any, name: str, role: Role, parameter: torch.Tensor) -> float | None:
    if parameter.ndim == 1:
        return None if name.endswith(".weight") else 0.0
    if role == "output" or (role == "modulation" and model.config.mup_adaln_init == "zero"):
        return 0.0
    return 1 / math.sqrt(parameter[0].numel())


def _role(model: Any, name: str) -> Role:
    for pattern, role in model._mup_roles:
        if fnmatch.fnmatchcase(name, pattern):
            return role
    raise ValueError(f"no μP role matches the parameter {name!r}; add a pattern to {type(model).__name__}._mup_roles")


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@torch.no_grad()
def init_weights(model: Any, generator: torch.Generator | None = None) -> None:
    """Initialise every parameter by its role; buffers and the sin-cos table stay.

    | role | weights | note |
    |---|---|---|
    | input, hidden | normal, fan_in^-1/2 | fan_in: features of one row; independent of the base width |
    | modulation | zeros, or as hidden | `mup_adaln_init`: adaLN-zero, or the μP paper's DiT |
    | output | zeros | the model predicts 0 at first |
    | vector, finite | biases zeros, gains ones | |

    Args:
        model: any model with `_mup_roles`.
        generator: source of the draws, on the parameters' device.
    """
    for rule, parameter in zip(mup_table(model), model.parameters(), strict=True):
        if rule.init_std is None:
            parameter.fill_(1.0)
        elif rule.init_std == 0.0:
            parameter.zero_()
        else:
            parameter.normal_(0.0, rule.init_std, generator=generator)


def param_groups(
    model: Any,
    lr: float,
    weight_decay: float = 0.0,
    *,
    eps: float = 1e-8,
    no_decay: Iterable[Role] = _NO_DECAY,
) -> list[dict[str, Any]]:
    """Parameter groups for an Adam-like optimiser, one per role, in a fixed order.

    Args:
        model: the model; frozen parameters are left out.
        lr: learning rate tuned at the base width.
        weight_decay: tuned at the base width.
        eps: Adam's epsilon at the base width.
        no_decay: roles without weight decay.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `eps`, and `role`, `lr_mult`, `names` for the reader.
    """
    no_decay = set(no_decay)
    groups: dict[tuple[Role, float, float, float], dict[str, Any]] = {}
    for rule, parameter in zip(mup_table(model), model.parameters(), strict=True):
        if not parameter.requires_grad:
            continue
        key = (rule.role, rule.lr_mult, rule.wd_mult, rule.eps_mult)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "role": rule.role,
                "lr": lr * rule.lr_mult,
                "lr_mult": rule.lr_mult,
                "weight_decay": 0.0 if rule.role in no_decay else weight_decay * rule.wd_mult,
                "eps": eps * rule.eps_mult,
            },
        )
        group["params"].append(parameter)
        group["names"].append(rule.name)
    return [groups[key] for key in sorted(groups)]
