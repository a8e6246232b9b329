"""Parameter groups of an optimiser under μP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch

from imgdit.mup.roles import ParameterRule, mup_settings, mup_table
from imgdit.mup.structure import Role, bare_model
from imgdit.naming import check_choice

OptimizerKind = Literal["adam", "muon", "sgd"]
_NO_DECAY: tuple[Role, ...] = ("vector", "finite")


class _Multipliers(NamedTuple):
    """Factors on the base learning rate, weight decay and epsilon."""

    lr: float
    wd: float
    eps: float


def param_groups(
    model: Any,
    lr: float,
    weight_decay: float = 0.0,
    *,
    optimizer_kind: OptimizerKind = "adam",
    eps: float = 1e-8,
    no_decay: Iterable[Role] = _NO_DECAY,
) -> list[dict[str, Any]]:
    """Parameter groups, one per role and multiplier, in a fixed order.

    | kind | for | hidden matrices | everything else |
    |---|---|---|---|
    | "adam" | Adam, AdamW, Lion: updates without the gradient's size | rate / m | as the table says |
    | "muon" | Muon, whose orthogonal updates have one size at every width | rate as it is | as under "adam" |
    | "sgd" | SGD with momentum (Tensor Programs V, table 8) | rate as it is | rate * m, readout om^2 / m |

    Muon's groups have `"use_muon": True` and no `eps`; give them to `torch.optim.Muon`, the others to AdamW.

    Args:
        model: the model, before or after DDP, FSDP (1 with `use_orig_params=True`, or 2), compile, activation
            checkpointing or PEFT wrapped it or parts of it; frozen parameters are left out.
        lr: learning rate tuned at the base width.
        weight_decay: tuned at the base width.
        optimizer_kind: see the table.
        eps: Adam's epsilon at the base width.
        no_decay: roles without weight decay.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `eps` (not for SGD and Muon), and `role`, `lr_mult`, `names` for
        the reader and for `check_rates`.

    Raises:
        ValueError: a model of unknown structure, or a parameter that no pattern matches.
    """
    check_choice("optimizer_kind", optimizer_kind, get_args(OptimizerKind))
    no_decay = set(no_decay)
    exponent = mup_settings(bare_model(model).config).wd_exponent
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for rule, parameter in zip(mup_table(model), model.parameters(), strict=True):
        if not parameter.requires_grad:
            continue
        muon = optimizer_kind == "muon" and is_for_muon(rule)
        mult = _multipliers(rule, "muon" if muon else "sgd" if optimizer_kind == "sgd" else "adam", exponent)
        key = (rule.role, *mult)
        if key not in groups:
            groups[key] = {
                "params": [],
                "names": [],
                "role": rule.role,
                "lr": lr * mult.lr,
                "lr_mult": mult.lr,
                "weight_decay": 0.0 if rule.role in no_decay else weight_decay * mult.wd,
            }
            if muon:
                groups[key]["use_muon"] = True
            elif optimizer_kind != "sgd":
                groups[key]["eps"] = eps * mult.eps
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(rule.name)
    return [groups[key] for key in sorted(groups)]


def is_for_muon(rule: ParameterRule) -> bool:
    """Whether Muon trains the parameter: a matrix that grows in both dimensions."""
    return rule.role in ("hidden", "modulation")


def _multipliers(rule: ParameterRule, kind: OptimizerKind, exponent: float) -> _Multipliers:
    """The table in `param_groups`; Adam's are in the rule itself."""
    if kind == "adam":
        return _Multipliers(rule.lr_mult, rule.wd_mult, rule.eps_mult)
    if kind == "muon":
        return _Multipliers(rule.fold, 1 / rule.fold, 1.0)
    # SGD's update is linear in the gradient, which a folded factor divides: it counts twice.
    matrix = rule.role in ("hidden", "modulation", "adapter")
    growth = 1.0 if matrix else rule.growth
    return _Multipliers(growth * rule.fold**2, growth**-exponent / rule.fold**2, 1.0)


def check_rates(optimizer: torch.optim.Optimizer) -> None:
    """Refuse learning rates that have lost μP's ratios; call it after each step of a scheduler that is not known.

    A scheduler keeps them if it multiplies (`LambdaLR`, `CosineAnnealingLR` down to 0, `MultiStepLR`), and loses them
    if it sets the same absolute rate everywhere (`OneCycleLR`, `CyclicLR`, `eta_min`).

    Raises:
        ValueError: names two groups whose rates do not fit each other.
    """
    rated = [group for group in optimizer.param_groups if "lr_mult" in group]
    if not rated:
        raise ValueError("no group of the optimiser has lr_mult; make the groups with imgdit.mup.param_groups")
    first = rated[0]
    base = float(first["lr"]) / first["lr_mult"]
    for group in rated[1:]:
        expected = base * group["lr_mult"]
        if abs(float(group["lr"]) - expected) > 1e-6 * abs(expected) + 1e-30:
            raise ValueError(
                f"the learning rates have lost μP's ratios: {first['role']!r} has {float(first['lr']):.4g}, so "
                f"{group['role']!r} should have {expected:.4g}, got {float(group['lr']):.4g}. The scheduler sets "
                "absolute rates; use one that multiplies each group's own rate, such as LambdaLR"
            )
