"""Whether a recipe learns at all: one batch, again and again."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

from imgdit.training.build import build_model, build_scheduler
from imgdit.training.optimizers import build_optimizer, optimizer_groups
from imgdit.training.recipe import Recipe
from imgdit.training.sources import training_batches

SECONDS = 60.0
"""That a check takes at most, without loading."""
STEPS = 100
"""Steps that it takes at most."""
FALLEN = 0.9
"""Loss after over loss before, below which a recipe learns."""


class Overfit(NamedTuple):
    """What a check found."""

    before: float
    """Loss of the batch at fixed noise before training, …"""
    after: float
    """… and after it."""
    steps: int
    """Optimiser steps done."""

    @property
    def learns(self) -> bool:
        """Whether the loss fell clearly."""
        return self.after < FALLEN * self.before

    @property
    def told(self) -> str:
        """The result as a message."""
        said = f"one batch, {self.steps} steps: loss {self.before:.4g} before, {self.after:.4g} after"
        if self.learns:
            return f"{said}. The recipe learns"
        return (
            f"{said}. The loss does not fall: look at optimizer.lr, at the data (imgdit data preview) and at what is "
            "trained (adapter.targets)"
        )


def overfit(recipe: Recipe, *, steps: int = STEPS, seconds: float = SECONDS) -> Overfit:
    """Train a recipe's model on its first micro-batch at the same noise in every step. Nothing is written.

    The learning rate is the recipe's from the first step on, without warm-up, and without mixed precision.

    Args:
        recipe: of any model.
        steps: of the optimiser, at most.
        seconds: after which no further step is begun.

    Raises:
        ValueError: what `training_batches` and `build_model` raise.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = recipe.replace(run={"evaluate_every": 0})
    batches, _ = training_batches(recipe)
    batch = next(batches.stream(0, max(recipe.run.batch_size // recipe.run.accumulation, 1))).batch.to(device)
    torch.manual_seed(recipe.run.seed)
    model, scheduler = build_model(recipe).to(device).train(), build_scheduler(recipe)
    objective = functools.partial(recipe.objective.function, **recipe.objective.arguments)
    optimizer = build_optimizer(optimizer_groups(model, recipe.optimizer), recipe.optimizer)

    def loss() -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(recipe.run.seed)
        return objective(model, scheduler, batch, generator).loss

    start, done = time.monotonic(), 0
    before = float(loss().detach())
    while done < steps and (done == 0 or time.monotonic() - start < seconds):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        done += 1
    with torch.no_grad():
        after = float(loss())
    return Overfit(before, after, done)
