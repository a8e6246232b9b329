"""The model of a finished run, with the weights it learned."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import CheckpointError, latest_checkpoint, load_weights, read_state
from .config import build_model, parse_recipe


def load_trained(folder: str | Path) -> torch.nn.Module:
    """The model of a run's latest checkpoint, the average of its weights if one was kept, ready for use.

    Args:
        folder: of the run, or of one checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    folder = Path(folder)
    checkpoint = latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder) or folder
    if not (checkpoint / "state.json").exists():
        raise CheckpointError(f"{folder} holds no checkpoint; train it first")
    model = build_model(parse_recipe(read_state(checkpoint)["recipe"], str(checkpoint)))
    load_weights(model, checkpoint)
    return model.requires_grad_(False).eval()
