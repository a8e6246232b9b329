"""What a run left: the model with the weights it learned, and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, latest_checkpoint, load_weights, read_state
from .config import Recipe, build_model, parse_recipe


def load_trained(folder: str | Path) -> Any:
    """The model of a run's latest checkpoint, the average of its weights if one was kept, ready for use.

    Args:
        folder: of the run, or of one checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = _checkpoint(folder)
    model = build_model(trained_recipe(checkpoint))
    load_weights(model, checkpoint)
    return model.requires_grad_(False).eval()


def trained_recipe(folder: str | Path) -> Recipe:
    """The recipe of a run, as its latest checkpoint holds it.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = _checkpoint(folder)
    return parse_recipe(read_state(checkpoint)["recipe"], str(checkpoint))


def _checkpoint(folder: str | Path) -> Path:
    folder = Path(folder)
    checkpoint = latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder) or folder
    if not (checkpoint / "state.json").exists():
        raise CheckpointError(f"{folder} holds no checkpoint; train it first")
    return checkpoint
