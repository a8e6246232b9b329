"""The optimisers of recipes: Adam with decoupled decay, its moments in 32 or 8 bits, and Muon for matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from imgdit.models.quantized import need
from imgdit.mup import MupMixin, mup_table, param_groups
from imgdit.mup.cost import MOMENT_BYTES
from imgdit.mup.groups import is_for_muon
from imgdit.training.recipe import OptimizerConfig

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Kinds that bitsandbytes makes, by its classes (arXiv 2110.02861; paged: arXiv 2305.14314)."""
STATE_BYTES = {"adamw": MOMENT_BYTES, "adamw_8bit": 2, "paged_adamw": MOMENT_BYTES, "paged_adamw_8bit": 2}
"""Bytes per trained parameter; paged ones move to the machine's memory where the GPU's is full."""
_MUON_BYTES = 4  # its momentum


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the groups with `use_muon`, `torch.optim.AdamW` for the others, as one optimiser: one
    list of groups for schedulers, one state for checkpoints.

    Args:
        groups: of `imgdit.mup.param_groups(…, optimizer_kind="muon")`.
        lr: of groups that have none.
        betas: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.99), momentum: float = 0.95
    ) -> None:
        matrices, others = ([g for g in groups if bool(g.get("use_muon")) == muon] for muon in (True, False))
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, momentum=momentum))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=betas))
        # Both have filled in what their groups lack; from here on the groups and the state are this optimiser's.
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            muon = isinstance(part, torch.optim.Muon)
            # Anew each time: loading a state replaces the groups.
            part.param_groups = [group for group in self.param_groups if bool(group.get("use_muon")) == muon]
            part.state = self.state
            part.step()
        return loss


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a recipe.

    Args:
        groups: of parameters, with their rates, see `optimizer_groups`.
        config: of the recipe.

    Raises:
        ImportError: bitsandbytes is needed and not installed.
    """
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    if config.kind == "muon":
        return MuonAdamW(groups, config.lr, config.betas, config.muon_momentum)
    need("bitsandbytes", f"optimizer.kind {config.kind!r}")
    import bitsandbytes

    return getattr(bitsandbytes.optim, BITSANDBYTES[config.kind])(groups, lr=config.lr, betas=config.betas)


def optimizer_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups: μP's for a model that knows its roles, otherwise weights with and the rest without decay, of
    each learning rate.

    Adapters on a frozen base are not μP-scaled: their width is the rank, which does not grow with the model.

    Raises:
        ValueError: `config.rates` under μP, or for parameters that are not trained; Muon for a model whose roles are
            not known, or for an adapter.
    """
    if isinstance(model, MupMixin) and not getattr(model, "peft_config", None):
        if config.rates:
            raise ValueError(f"optimizer.rates is not for {type(model).__name__}, whose rates are those of μP")
        return _mup_groups(model, config)
    if config.kind == "muon":
        what = "an adapter" if getattr(model, "peft_config", None) else type(model).__name__
        raise ValueError(
            "optimizer.kind 'muon' needs a model whose hidden matrices are known by their μP roles and trained "
            f"themselves (mmdit, nextdit), got {what}; use optimizer.kind 'adamw'"
        )
    trained: dict[float, list[torch.nn.Parameter]] = {config.lr: []}
    unused = dict(config.rates)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pattern = next((one for one in config.rates if re.fullmatch(one, name)), None)
            unused.pop(pattern or "", None)
            rate = config.lr if pattern is None else config.rates[pattern]
            trained.setdefault(rate, []).append(parameter)
    if unused:
        raise ValueError(f"optimizer.rates names {next(iter(unused))!r}, which is no parameter that is trained")
    groups = [
        {
            "params": [p for p in found if (p.ndim > 1) == decays],
            "weight_decay": config.weight_decay * decays,
            "lr": rate,
        }
        for rate, found in trained.items()
        for decays in (True, False)
    ]
    return [{**group, "eps": config.eps} for group in groups if group["params"]]


def _mup_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """μP's groups; of Muon those of matrices at its own rate, and with AdamW's decay per step."""
    if config.kind != "muon":
        return param_groups(model, config.lr, config.weight_decay, eps=config.eps)
    groups = param_groups(model, config.lr, config.weight_decay, optimizer_kind="muon", eps=config.eps)
    ratio = config.muon_lr / config.lr
    for group in groups:
        if group.get("use_muon"):
            group["lr"] *= ratio
            group["lr_mult"] *= ratio
            group["weight_decay"] /= ratio
    return groups


def state_bytes(model: torch.nn.Module, kind: str) -> float:
    """Bytes of the state that a kind of optimiser keeps for the trained parameters of a model."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    if kind != "muon":
        return STATE_BYTES[kind] * sum(trained)
    return sum(
        p.numel() * (_MUON_BYTES if is_for_muon(rule) else MOMENT_BYTES)
        for rule, p in zip(mup_table(model), model.parameters(), strict=True)
        if p.requires_grad
    )
