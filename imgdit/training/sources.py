"""What the data of a recipe is: the name in its `data` section, and the batches that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from ..data.pictures import ScenePictures
from ..data.sentences import SLOTS, SceneSentences
from ..data.words import caption_tokenizer
from ..models.caption_reader import CaptionReader
from ..naming import nearest
from .config import Recipe, check_arguments
from .data import Batches, MapDataset
from .objectives import Pictures, Sentences


class Source(NamedTuple):
    """One kind of data."""

    dataset: Callable[..., MapDataset]
    """Class of the data set; a recipe's `data.arguments` are its keyword arguments."""
    collate: Callable[[list[Any]], Any]
    """Its samples to a batch."""
    held_out: int
    """Samples of the held-out split that the held-out loss is measured on."""


def collate_pictures(samples: Sequence[torch.Tensor]) -> Pictures:
    """Samples (K, 3, S, S) to one batch of all their pictures."""
    return Pictures(torch.cat(list(samples)))


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return caption_tokenizer()


def collate_sentences(samples: Sequence[tuple[str, list[int]]]) -> Sentences:
    """Sentences and their answers to one batch, padded to the longest."""
    tokens = _tokenizer()([sentence for sentence, _ in samples], padding="longest", return_tensors="pt")
    answers = torch.tensor([numbers for _, numbers in samples])
    return Sentences(tokens.input_ids, tokens.attention_mask.bool(), answers)


def scene_reader(d_model: int = 192, num_layers: int = 3, num_heads: int = 6, d_ff: int = 512) -> CaptionReader:
    """A reader of the scenes' sentences; arguments as of `CaptionReader`."""
    return CaptionReader(SLOTS, len(_tokenizer()), d_model, num_layers, num_heads, d_ff)


SOURCES = {
    "scene_pictures": Source(ScenePictures, collate_pictures, held_out=16),
    "scene_sentences": Source(SceneSentences, collate_sentences, held_out=512),
}


def training_batches(recipe: Recipe) -> tuple[Batches, list[Any]]:
    """The batches of a recipe, and those of its held-out loss.

    Raises:
        ValueError: no such data, or arguments that it does not take.
    """
    config = recipe.data
    if config.name not in SOURCES:
        raise ValueError(f"data.name is {nearest(config.name, SOURCES)}")
    source = SOURCES[config.name]
    check_arguments(source.dataset, config.arguments, "data.arguments")
    batches = Batches(
        source.dataset(**config.arguments),
        source.collate,
        seed=recipe.run.seed,
        shuffle=config.shuffle,
        workers=config.workers,
    )
    if not recipe.run.evaluate_every:
        return batches, []
    unseen = source.dataset(**{**config.arguments, "split": "heldout"})
    return batches, [source.collate([unseen[i] for i in range(source.held_out)])]
