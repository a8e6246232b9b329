"""Adam with decoupled decay, its moments in 32 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from imgdit.models.quantized import need
from imgdit.mup.cost import MOMENT_BYTES
from imgdit.training.recipe import OptimizerConfig

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Kinds that bitsandbytes makes, by its classes (arXiv 2110.02861; paged: arXiv 2305.14314)."""
STATE_BYTES = {"adamw": MOMENT_BYTES, "adamw_8bit": 2, "paged_adamw": MOMENT_BYTES, "paged_adamw_8bit": 2}
"""Bytes per trained parameter; paged ones move to the machine's memory where the GPU's is full."""


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a recipe.

    Args:
        groups: of parameters, with their rates.
        config: of the recipe.

    Raises:
        ImportError: bitsandbytes is needed and not installed.
    """
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    need("bitsandbytes", f"optimizer.kind {config.kind!r}")
    import bitsandbytes

    return getattr(bitsandbytes.optim, BITSANDBYTES[config.kind])(groups, lr=config.lr, betas=config.betas)
