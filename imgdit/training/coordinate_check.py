"""The coordinate check of a recipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from imgdit.io.order import mixed_seed
from imgdit.mup.coordinates import CoordinateCheck, Means, average, record
from imgdit.mup.roles import Parametrisation
from imgdit.training.build import build_model, build_scheduler
from imgdit.training.optimizers import build_optimizer, optimizer_groups
from imgdit.training.recipe import Recipe
from imgdit.training.sources import training_batches
from imgdit.training.widths import PARAMETRISATIONS, at_width, base_width_of


def coordinate_check(
    recipe: Recipe,
    widths: Sequence[int],
    *,
    steps: int = 4,
    seeds: int = 3,
    parametrisations: Sequence[Parametrisation] = PARAMETRISATIONS,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Parametrisation, CoordinateCheck]:
    """Train the recipe's model on its first batch for a few steps at each width.

    The learning rate is constant and no gradient is clipped, so that what is seen is the parametrisation's doing.

    Args:
        recipe: any recipe of a backbone trained from scratch.
        widths: at least two multiples of the head dimension.
        steps: forward passes, with an update between two.
        seeds: initial weights to average over.
        parametrisations: what to check.
        progress: is told each finished model.

    Raises:
        ValueError: a recipe or widths that cannot be compared.
    """
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise ValueError(f"a slope needs at least two widths, got {widths}")
    if steps < 2:
        raise ValueError(f"the first update is seen in step 2; steps must be at least 2, got {steps}")
    base = base_width_of(recipe, widths)
    # Before any work, so that a width that does not fit is refused at once.
    recipes = {(p, width): at_width(recipe, width, p, base) for p in parametrisations for width in widths}
    checks = {}
    for parametrisation in parametrisations:
        runs: dict[int, list[Means]] = {width: [] for width in widths}
        for width in widths:
            for seed in range(recipe.run.seed, recipe.run.seed + seeds):
                own = recipes[parametrisation, width].replace(run={"seed": seed, "evaluate_every": 0})
                runs[width].append(_record(own, steps))
            progress(f"{parametrisation}, width {width}")
        checks[parametrisation] = average(widths, runs)
    return checks


def _record(recipe: Recipe, steps: int) -> Means:
    batches, _ = training_batches(recipe)
    batch = next(batches.stream(0, recipe.run.batch_size // recipe.run.accumulation)).batch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, model, scheduler = batch.to(device), build_model(recipe).to(device), build_scheduler(recipe)
    config = recipe.optimizer
    if config.kind != "muon":  # how the moments are kept does not matter here
        config = dataclasses.replace(config, kind="adamw")
    optimizer = build_optimizer(optimizer_groups(model, config), config)
    objective = functools.partial(recipe.objective.function, **recipe.objective.arguments)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(mixed_seed(recipe.run.seed))  # the same noise every time
        return objective(model, scheduler, batch, generator).loss

    return record(model, optimizer, loss, steps)
