"""From a folder's name to a text pipeline: saved pipelines, and published folders of language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from imgdit import compat
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.hub import INDEX
from imgdit.io.safe_json import read_object
from imgdit.models.bd3lm import load_bd3lm
from imgdit.models.masked_lm import load_masked_lm, model_folder
from imgdit.pipelines.block_text import BlockTextPipeline
from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler

TEXT = "text"
"""Folder of the embedded model's language model."""
BLOCKS = "blocks"
"""Name of the block diffusion (BD3-LM) that comes along too, and its folder there."""
HOLE = "_"
"""How a person writes a token that is to be filled."""
_HOLES = re.compile(rf"(?<!\w){HOLE}(?!\w)")


def load_text_pipeline(
    source: str | Path = EMBEDDED, *, tokenizer: str | Path | None = None, dtype: torch.dtype | None = None
) -> MaskedTextPipeline | BlockTextPipeline:
    """A pipeline that writes text.

    Args:
        source: folder that a text pipeline's `save_pretrained` wrote, or folder or Hub repository of a published
            language model (LLaDA, Dream, BD3-LM and relatives); "embedded": the masked language model that comes
            along; "blocks": the block diffusion that does.
        tokenizer: folder or repository of the tokenizer, where the model's has none.
        dtype: of the weights; `None`: as stored for published folders, float32 for saved pipelines.

    Raises:
        ValueError: neither, or a model without a tokenizer.
    """
    place = {EMBEDDED: SCENES / TEXT, BLOCKS: SCENES / TEXT / BLOCKS}.get(str(source), Path(source).expanduser())
    if (place / INDEX).is_file():
        pipe = compat.DiffusionPipeline.from_pretrained(place, dtype=dtype or torch.float32)
        if not isinstance(pipe, (MaskedTextPipeline, BlockTextPipeline)):
            raise ValueError(f"{place} is a {type(pipe).__name__}, which writes no text")
        return pipe
    folder = model_folder(str(place) if place.is_dir() else source, None, None, None)
    words = load_tokenizer(folder if tokenizer is None else tokenizer)
    if read_object(folder / "config.json").get("model_type") == "bd3lm":
        return BlockTextPipeline(load_bd3lm(folder, dtype=dtype), words)
    model = load_masked_lm(folder, dtype="auto" if dtype is None else dtype)
    return MaskedTextPipeline(model, MaskedTextScheduler(), words)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or Hub repository, without remote code.

    Raises:
        ValueError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no tokenizer that transformers reads ({error}); name one") from error


def with_holes(pipe: MaskedTextPipeline, text: str) -> str:
    """A text in which each `_` that is no part of a word is the model's mask token; all else stays as it is.

    Raises:
        ValueError: it has none.
    """
    mask = pipe.tokenizer.convert_ids_to_tokens(pipe.mask_token_id)
    found, holes = _HOLES.subn(lambda _: mask, text)
    if not holes:
        raise ValueError(f"{text!r} has no hole; write {HOLE} in the place of each token to fill")
    return found
