"""From a run, a LoRA file or a pipeline's folder to a folder for the Hub, with a model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import imgdit
from imgdit.adapters.sharing import save_adapter
from imgdit.apps.chores import weights
from imgdit.apps.chores.run_pipeline import run_pipeline
from imgdit.cards import CardDetails, write_card
from imgdit.checkpoints import EMBEDDED
from imgdit.compat import DiffusionPipeline
from imgdit.hub import INDEX
from imgdit.io.checkpoints import CheckpointError
from imgdit.io.text import lines_or_errors
from imgdit.lora.files import read_adapter
from imgdit.pipelines.sharing import pipeline_card, save_pipeline
from imgdit.training.run_folder import RunFolder
from imgdit.training.trained import trained_recipe


def card_folder(source: Path, out: Path, details: CardDetails, name: str | None = None) -> Path:
    """Write what is published, and its card. What `details` lacks a run tells: recipe, last metrics, newest sheet.

    Args:
        source: folder of a run, a LoRA file, or a pipeline's folder, which itself gets the card.
        out: folder to write, of the other two.
        details: of the card.
        name: Hub id that the card loads from; the folder by default.

    Returns:
        The folder to upload.

    Raises:
        ValueError: none of these, a run without a checkpoint, or an image that cannot be read.
    """
    if (source / INDEX).is_file():
        owner = DiffusionPipeline.load_config(source).get("_class_name")
        write_card(source, pipeline_card(_class_of(str(owner)), name or source.name, details))
        return source
    if source.suffix == ".safetensors" and source.is_file():
        return _adapter_folder(source, out, details, name)
    try:
        recipe = trained_recipe(source)
    except (CheckpointError, ValueError) as error:
        raise ValueError(
            f"{source} is no folder of a run, no pipeline's folder and no .safetensors file: {error}"
        ) from error
    details = replace(
        details,
        recipe=details.recipe or yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True),
        metrics=details.metrics or last_metrics(source),
        image=details.image or _newest_sheet(source),
    )
    if not recipe.adapter.rank:
        return save_pipeline(run_pipeline(source), out, details, source=name)
    file = out / f"{(name or source.name).rpartition('/')[2].replace('.', '_')}.safetensors"
    weights.save_adapter(source, file)
    return _adapter_folder(file, out, details, name)


def last_metrics(run: Path) -> dict[str, float]:
    """The last value of each metric of a run; times and rates are the machine's and left out."""
    path = RunFolder(run, keep=1).metrics
    found: dict[str, float] = {}
    for line in lines_or_errors(path.read_bytes(), str(path)) if path.is_file() else []:
        if isinstance(line, str) and line.startswith("{") and line.endswith("}"):
            found |= {name: value for name, value in json.loads(line).items() if type(value) in (int, float)}
    return {name: value for name, value in found.items() if "second" not in name and "per_s" not in name}


def _adapter_folder(file: Path, out: Path, details: CardDetails, name: str | None) -> Path:
    adapter = read_adapter(file)
    own = _is_own(details.base_model or adapter.info.base_model)
    save_adapter(out, file.stem, adapter.pairs, adapter.info, details, source=name, own=own)
    return out


def _is_own(base_model: str | None) -> bool:
    """Whether an adapter's base is a pipeline of imgdit, as far as this machine knows."""
    if base_model is None or base_model == EMBEDDED:
        return base_model == EMBEDDED
    folder = Path(base_model).expanduser()
    return (folder / INDEX).is_file() and DiffusionPipeline.load_config(folder).get("_class_name") in imgdit.__all__


def _newest_sheet(run: Path) -> Path | None:
    return max((run / "samples").glob("step-*.png"), default=None)


def _class_of(name: str) -> Any:
    import diffusers

    found = getattr(imgdit if name in imgdit.__all__ else diffusers, name, None)
    if found is None:
        raise ValueError(f"its {INDEX} names {name!r}, which is no pipeline of imgdit or diffusers")
    return found
