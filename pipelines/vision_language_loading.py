"""From a folder's name to a vision-language pipeline: saved pipelines, and published folders of LLaDA-V and LaViDa."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from imgdit import compat
from imgdit.hub import HUB_ID, INDEX, hub_file
from imgdit.io.safe_json import read_object
from imgdit.models.masked_lm import model_folder
from imgdit.models.vision_language import VisionLanguageModel, load_vision_language
from imgdit.pipelines.dialogues import SpecialTokens
from imgdit.pipelines.text_loading import load_tokenizer
from imgdit.pipelines.vision_language import LaViDaPipeline, LLaDAVPipeline, VisionLanguagePipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler


def load_vision_language_pipeline(
    source: str | Path,
    *,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> VisionLanguagePipeline:
    """A pipeline that answers questions about images.

    Args:
        source: folder that such a pipeline's `save_pretrained` wrote, or folder or Hub repository of LLaDA-V or
            LaViDa.
        vision_tower: folder or repository of the tower, in place of the one that `config.json` names.
        tokenizer: folder or repository of the tokenizer, where the model's has none.
        dtype: of the weights; `None`: as stored for published folders, float32 for saved pipelines.

    Raises:
        ValueError: neither, a model without a tower or a tokenizer, or parts of different models.
    """
    place = Path(source).expanduser()
    if (place / INDEX).is_file():
        return _saved(place, dtype=dtype or torch.float32)
    folder = model_folder(str(place) if place.is_dir() else source, None, None, None)
    words = load_tokenizer(folder if tokenizer is None else tokenizer)
    named = read_object(folder / "config.json").get("mask_token_id")
    parts = load_vision_language(
        folder, vision_tower=vision_tower, mask_token_id=SpecialTokens.of(words).mask if named is None else named,
        dtype="auto" if dtype is None else dtype,
    )  # fmt: skip
    return _published(folder, parts, words)


def is_published(source: str | Path) -> bool:
    """Whether a name is a published folder of LLaDA-V or LaViDa, here or on the Hub."""
    return model_type_of(source) == "llava_llada"


def model_type_of(source: str | Path) -> str | None:
    """What the `config.json` of a folder here or of a Hub repository says of its model; `None`: there is none."""
    file = Path(source).expanduser() / "config.json"
    if not file.parent.exists() and re.fullmatch(HUB_ID, str(source)):
        try:
            file = hub_file(str(source), "config.json")
        except Exception:  # of whichever library carries the request; whoever loads it tells what is wrong
            return None
    return read_object(file).get("model_type") if file.is_file() else None


def with_parts(source: str | Path, parts: VisionLanguageModel) -> VisionLanguagePipeline:
    """The pipeline of a folder over other parts of the same sizes, such as trained ones.

    Args:
        source: as of `load_vision_language_pipeline`.
    """
    place = Path(source).expanduser()
    if (place / INDEX).is_file():
        return _saved(
            place, model=parts.language_model, vision_tower=parts.vision_tower, projector=parts.projector
        )  # fmt: skip
    folder = model_folder(str(place) if place.is_dir() else source, None, None, None)
    return _published(folder, parts, load_tokenizer(folder))


def _saved(place: Path, **options: Any) -> VisionLanguagePipeline:
    pipe = compat.DiffusionPipeline.from_pretrained(place, **options)
    if not isinstance(pipe, VisionLanguagePipeline):
        raise ValueError(f"{place} is a {type(pipe).__name__}, which answers no questions about images")
    return pipe


def _published(folder: Path, parts: VisionLanguageModel, tokenizer: Any) -> VisionLanguagePipeline:
    """LaViDa's folders have LLaDA's own names of sizes, LLaDA-V's those of Llama."""
    lavida = "d_model" in read_object(folder / "config.json")
    scheduler = MaskedTextScheduler(reveal="shift", threshold=2.0) if lavida else MaskedTextScheduler(threshold=2.0)
    owner = LaViDaPipeline if lavida else LLaDAVPipeline
    return owner(parts.language_model, parts.vision_tower, parts.projector, scheduler, tokenizer)
