"""What a run left: the model with the weights it learned, and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from imgdit.io.checkpoints import (
    CheckpointError,
    check_architecture,
    find_checkpoint,
    load_weights,
    read_shapes,
    read_state,
)
from imgdit.training.build import build_model
from imgdit.training.objectives.alignment import drop_head
from imgdit.training.recipe import ADAPTER, Recipe, parse_recipe


def load_trained(folder: str | Path) -> Any:
    """The model of a run's latest checkpoint, the average of its weights if one was kept, ready for use.

    Args:
        folder: of the run, or of one checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = find_checkpoint(folder)
    recipe = trained_recipe(checkpoint)
    if not recipe.adapter.rank:  # all weights are in the checkpoint; where training began is of no matter now
        recipe = recipe.replace(model={"start_from": None})
    _check_size(recipe, checkpoint)
    model = build_model(recipe)
    load_weights(model, checkpoint)
    drop_head(model)
    return model.requires_grad_(False).eval()


def load_merged(folder: str | Path) -> Any:
    """The model of a run that trained a LoRA, with it added to the unquantised weights that it was trained on.

    Args:
        folder: of the run, or of one checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    from peft.tuners.lora import LoraLayer

    checkpoint = find_checkpoint(folder)
    recipe = trained_recipe(checkpoint).replace(model={"quantize": "none", "dtype": "float32"})
    adapted, merged = build_model(recipe), build_model(recipe.replace(adapter={"rank": 0}))
    load_weights(adapted, checkpoint)
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                merged.get_submodule(name).weight += module.get_delta_weight(ADAPTER)
    drop_head(merged)
    return merged.requires_grad_(False).eval()


def trained_recipe(folder: str | Path) -> Recipe:
    """The recipe of a run, as its latest checkpoint holds it.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = find_checkpoint(folder)
    return parse_recipe(read_state(checkpoint, ("recipe",))["recipe"], str(checkpoint))


def _check_size(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse a model that these weights are not of before anything of its size is made."""
    config, weights = recipe.model, checkpoint / "model.safetensors"
    if config.pretrained is not None or recipe.adapter.rank:
        return  # its sizes are those of another folder
    tensors = read_shapes(weights)
    for name, value in config.arguments.items():
        counts = value if isinstance(value, (list, tuple)) else [value]
        if "layers" in name and any(isinstance(count, int) and count > len(tensors) for count in counts):
            raise CheckpointError(
                f"{checkpoint}: its recipe has {name}={value}, its weights are {len(tensors)} tensors"
            )
    try:
        with torch.device("meta"):
            own = build_model(recipe).state_dict()
        if read_state(checkpoint, ("partial",))["partial"]:
            own = {name: tensor for name, tensor in own.items() if name in tensors}
        check_architecture(weights, own)
    except (RuntimeError, TypeError) as error:  # sizes that are no 64-bit numbers, or whose product is none
        raise CheckpointError(f"{checkpoint}: its recipe is of no model that can be made: {error}") from error
