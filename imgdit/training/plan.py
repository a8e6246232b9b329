"""What a recipe costs before it is run, and which proxy to tune in its place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from imgdit.mup.cost import ModelCost, model_cost
from imgdit.naming import old_names
from imgdit.training.build import build_model
from imgdit.training.recipe import Recipe
from imgdit.training.widths import at_width, base_width_of

PROXY_FRACTION = 0.01
"""Parameters of the proxy over the target's, at one depth: 0.18B for 18B (arXiv 2505.15270)."""
STEPS_FRACTION = 0.15
"""Steps of a proxy's run over the target's: 30 of 200 thousand in the same paper."""


class Plan(NamedTuple):
    """Cost of one recipe."""

    name: str
    cost: ModelCost
    step_flops: float
    memory: float
    """Bytes per GPU."""
    days: float
    """Of the whole run on the GPUs."""


@old_names(share="fraction")
class ProxyPlan(NamedTuple):
    """A target, the proxy to tune in its place, and what that saves."""

    target: Plan
    proxy: Plan
    target_recipe: Recipe
    proxy_recipe: Recipe
    fraction: float
    """Cost of all trials relative to the target's run: R * S * B * T of the proxies over S * B * T of the target."""


def plan(
    name: str, recipe: Recipe, *, image_tokens: int, text_tokens: int, gpus: int, flops_per_second: float
) -> Plan:
    """Cost of a recipe by the formulas of `imgdit.mup.cost`; builds its model on the meta device.

    Args:
        name: for the reader.
        recipe: of an MMDiT.
        image_tokens, text_tokens: of one sample.
        gpus: that share the weights and the batch.
        flops_per_second: what one GPU reaches.

    Raises:
        ValueError: another kind of model, or a batch that the GPUs do not divide.
    """
    cost = recipe_cost(recipe, image_tokens, text_tokens)
    fraction = gpus * recipe.run.accumulation
    if recipe.run.batch_size % fraction:
        raise ValueError(
            f"{name}: run.batch_size={recipe.run.batch_size} does not divide by {gpus} GPUs times "
            f"run.accumulation={recipe.run.accumulation}"
        )
    checkpointing = recipe.model.gradient_checkpointing
    flops = cost.step_flops(recipe.run.batch_size, checkpointing=checkpointing)
    memory = cost.memory(
        gpus, recipe.run.batch_size // fraction, checkpointing=checkpointing, average=recipe.ema.decay > 0
    )
    days = flops * recipe.run.steps / (gpus * flops_per_second) / 86400
    return Plan(name, cost, flops, memory, days)


def recipe_cost(recipe: Recipe, image_tokens: int, text_tokens: int) -> ModelCost:
    """Cost of a recipe's model."""
    if recipe.model.kind != "mmdit":
        raise ValueError(f"costs are known for model.kind 'mmdit', got {recipe.model.kind!r}")
    with torch.device("meta"):
        model: Any = build_model(recipe)
    return model_cost(model, image_tokens, text_tokens)


def proxy_plan(recipe: Recipe, target_params: float, trials: int, **options: Any) -> ProxyPlan:
    """A target of about `target_params` parameters in the recipe's architecture, and the proxy to tune.

    Only widths differ: parameters go with the width's square, the proxy has a hundredth of the target's and is at most
    half as wide, and its runs take 15 % of the steps.

    Args:
        recipe: gives the depth, batch, steps and everything else.
        target_params: wanted.
        trials: runs of the proxy.
        options: see `plan`.
    """
    base = base_width_of(recipe, [recipe_cost(recipe, 1, 1).width])
    if target_params < 1e6:
        raise ValueError(f"target-params counts parameters, such as 5e9; got {target_params:g}")
    wide = _of_size(recipe, target_params, base)
    width = recipe_cost(wide, 1, 1).width
    head_dim = width // wide.model.arguments["num_attention_heads"]
    narrow_width = max(head_dim, min(width // 2, round(width * math.sqrt(PROXY_FRACTION))) // head_dim * head_dim)
    steps = max(round(STEPS_FRACTION * recipe.run.steps), 1)
    target_recipe = at_width(wide, width, "mup", narrow_width)
    proxy_recipe = at_width(recipe, narrow_width, "mup", narrow_width).replace(
        run={"steps": steps}, schedule={"warmup": min(recipe.schedule.warmup, steps // 10), "decay": 0}
    )
    target, proxy = (plan(n, r, **options) for n, r in (("target", target_recipe), ("proxy", proxy_recipe)))
    fraction = trials * proxy.cost.parameters * steps / (target.cost.parameters * recipe.run.steps)
    return ProxyPlan(target, proxy, target_recipe, proxy_recipe, fraction)


def _of_size(recipe: Recipe, parameters: float, base: int) -> Recipe:
    """The recipe at the width whose parameters are nearest."""
    cost = recipe_cost(recipe, 1, 1)
    head_dim = cost.width // recipe.model.arguments["num_attention_heads"]
    guess = cost.width * math.sqrt(parameters / cost.parameters)
    heads = max(round(guess / head_dim), 2)
    near = [at_width(recipe, h * head_dim, "mup", base) for h in range(max(heads - 1, 2), heads + 2)]
    return min(near, key=lambda r: abs(recipe_cost(r, 1, 1).parameters - parameters))
