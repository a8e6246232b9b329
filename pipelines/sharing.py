"""A whole pipeline as others load it: its folder, and a model card that says how."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import imgdit
from imgdit.cards import CardDetails, ModelCard, write_card
from imgdit.hub import push_folder

_LOAD = """from {package} import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source})"""
_IMAGE = """
image = pipe(prompt="a red cube on a table").images[0]"""


def save_pipeline(
    pipe: Any, folder: str | Path, details: CardDetails | None = None, *, source: str | None = None
) -> Path:
    """Write a pipeline of imgdit or diffusers and its model card.

    Args:
        pipe: the pipeline.
        folder: is made where it is missing; a README.md that somebody wrote stays.
        details: licence, image, recipe, metrics and description of the card.
        source: what the card loads the pipeline from; the folder by default.

    Returns:
        The folder.

    Raises:
        ValueError: the card's image cannot be read, or the disk refuses.
    """
    folder = Path(folder)
    write_card(folder, pipeline_card(type(pipe), source or folder.name, details))
    pipe.save_pretrained(folder)
    return folder


def push_pipeline(pipe: Any, repository: str, details: CardDetails | None = None, **hub: Any) -> str:
    """Upload a pipeline of imgdit or diffusers with its model card.

    Args:
        pipe, details: see `save_pipeline`.
        repository: owner/name on the Hub.
        hub: `private`, `token`, `message` of `push_folder`.

    Returns:
        The repository's address.

    Raises:
        ValueError: the card's image cannot be read, or the Hub cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(pipe, folder, details, source=repository)
        return push_folder(folder, repository, **hub)


def pipeline_card(pipeline: type, source: str, details: CardDetails | None = None) -> ModelCard:
    """The model card of a pipeline's folder.

    Args:
        pipeline: its class.
        source: folder or Hub id that it is loaded from.
        details: see `CardDetails`.
    """
    own = pipeline.__name__ in imgdit.__all__
    images = "vae" in inspect.signature(pipeline).parameters
    usage = _LOAD.format(package="imgdit" if own else "diffusers", source=json.dumps(source))
    first = (inspect.getdoc(pipeline) or "").partition("\n")[0] if own else "a pipeline of diffusers."
    return ModelCard(
        title=source.rpartition("/")[2],
        summary=f"`{pipeline.__name__}`: {first}",
        usage=usage + (_IMAGE if images else ""),
        details=details or CardDetails(),
        tags=(pipeline.__name__,),
        pipeline_tag="text-to-image" if images else None,
        relation="finetune",
    )
