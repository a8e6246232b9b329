"""What the folder of a training run of sparse autoencoders says for their model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from imgdit.cards import CardDetails
from imgdit.hub import HUB_ID
from imgdit.io.checkpoints import latest_checkpoint, read_state
from imgdit.io.text import read_lines
from imgdit.training.run_folder import RunFolder

_SHOWN = {
    "fvu": "unexplained variance",
    "l0": "active features per token",
    "dead": "dead features",
    "picture_distance": "distance of held-out images",
}
"""Metrics of a run that a card shows, and what they are called there."""
_PATHS = (
    ("pipeline", "pretrained"), ("run", "folder"), ("data", "shards"), ("data", "prompts_file"), ("sae", "pretrained"),
)  # fmt: skip
"""Entries of a recipe that name places on this machine; the first may be a Hub repository instead."""


def run_details(saes: str | Path) -> CardDetails:
    """Recipe, last metrics and base model of the run that wrote a folder of autoencoders; empty for other folders.

    Args:
        saes: `<run>/saes`. Paths of this machine in the recipe are left out.

    Raises:
        ValueError: a damaged file of the run.
    """
    run = RunFolder(Path(saes).parent, keep=1)
    metrics: dict[str, float | str] = {}
    for number, line in enumerate(read_lines(run.metrics) if run.metrics.is_file() else (), start=1):
        try:
            values = json.loads(line)
            place = values["hookpoint"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run.metrics}, line {number}, is no line of metrics with a hookpoint") from error
        metrics |= {f"{words}, {place}": values[name] for name, words in _SHOWN.items() if name in values}
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        return CardDetails(metrics=metrics)
    recipe = read_state(checkpoint, ("recipe",))["recipe"]
    base = str(recipe.get("pipeline", {}).get("pretrained", ""))
    here = Path(base).exists()
    for section, name in _PATHS if here else _PATHS[1:]:
        if isinstance(recipe.get(section), dict):
            recipe[section].pop(name, None)
    return CardDetails(
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        metrics=metrics,
        base_model=base if re.fullmatch(HUB_ID, base) and not here else None,
    )
