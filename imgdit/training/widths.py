"""A recipe at another width, under μP or the standard parametrisation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from imgdit.family import family_named
from imgdit.mup.roles import Parametrisation
from imgdit.mup.structure import Structure
from imgdit.training.recipe import Recipe

PARAMETRISATIONS: tuple[Parametrisation, ...] = ("mup", "standard")


def at_width(recipe: Recipe, width: int, parametrisation: Parametrisation, base_width: int) -> Recipe:
    """The recipe with its model at `width`, by more heads of the same size; everything else as it is.

    Args:
        recipe: of a model that is trained from scratch and has μP fields.
        width: a multiple of the head dimension.
        parametrisation: "mup", or "standard": one learning rate for all parameters, from the same initial weights.
        base_width: where both are the same.

    Raises:
        ValueError: a model whose width cannot change, or a width that heads do not divide.
    """
    structure, arguments = _structure(recipe), _arguments(recipe)
    head_dim = structure.head_dim_of(arguments)
    for name, value in (("width", width), ("base width", base_width)):
        if value < head_dim or value % head_dim:
            raise ValueError(f"{name} must be a multiple of the head dimension {head_dim}, got {value}")
    changed = {**recipe.model.arguments, structure.heads: width // head_dim}
    if len(structure.width) == 1:
        changed[structure.width[0]] = width
    if structure.kv_heads and (groups := arguments[structure.kv_heads]) is not None:
        grown = groups * width // head_dim
        if grown % arguments[structure.heads]:
            raise ValueError(
                f"width {width} has {width // head_dim} heads, which cannot share keys and values as "
                f"{arguments[structure.heads]} heads share {groups}; set {structure.kv_heads}: null"
            )
        changed[structure.kv_heads] = grown // arguments[structure.heads]
    for name in [name for name in changed if name.startswith("mup_base_")]:
        del changed[name]
    if parametrisation == "mup":
        kept = {name: value for name, value in recipe.model.arguments.items() if name.startswith("mup_base_")}
        changed |= {**kept, "mup_base_width": base_width}
    return recipe.replace(model={"arguments": changed})


def base_width_of(recipe: Recipe, widths: Sequence[int]) -> int:
    """The recipe's base width, or the smallest of the widths to compare."""
    return recipe.model.arguments.get("mup_base_width") or min(widths)


def _structure(recipe: Recipe) -> Structure:
    model = recipe.model
    name = getattr(model.model_class, "__name__", model.kind)
    family = family_named(name)
    if family is None or family.mup is None or "mup_base_width" not in _parameters(recipe):
        raise ValueError(
            f"model.kind {model.kind!r} has no μP parametrisation, so its width cannot be compared; give a recipe "
            "of a transformer backbone (mmdit, nextdit)"
        )
    for field in ("pretrained", "start_from"):
        if (source := getattr(model, field)) is not None:
            raise ValueError(f"model.{field}={source!r} has one width; give a recipe that trains from scratch")
    return family.mup


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """The model's arguments with the defaults of what the recipe leaves out."""
    defaults = {name: parameter.default for name, parameter in _parameters(recipe).items()}
    return {**defaults, **recipe.model.arguments}


def _parameters(recipe: Recipe) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(recipe.model.model_class).parameters)
