"""What the data of a recipe is: the name in its `data` section, and the batches that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..data.pictures import ScenePictures
from ..data.readings import SceneReadings
from ..data.sentences import SceneSentences
from ..naming import nearest
from .blobs import BlobLatents, collate_blobs
from .config import Recipe, check_arguments
from .data import Batches, MapDataset
from .objectives import Batch, Pictures
from .own_pictures import OwnPictures
from .reader import collate_readings, collate_sentences
from .scene_conditions import SceneConditions
from .scene_frames import SceneFrames


class Source(NamedTuple):
    """One kind of data."""

    dataset: Callable[..., MapDataset]
    """Class of the data set; a recipe's `data.arguments` are its keyword arguments."""
    collate: Callable[[list[Any]], Any]
    """Its samples to a batch."""
    held_out: int
    """Samples of the held-out split that the held-out loss is measured on."""
    whole_batches: bool = False
    """Whether a sample is a batch already."""


def collate_pictures(samples: Sequence[torch.Tensor]) -> Pictures:
    """Samples (K, 3, S, S) to one batch of all their pictures."""
    return Pictures(torch.cat(list(samples)))


def only_batch(samples: Sequence[Batch]) -> Batch:
    """The only sample, which is a batch already."""
    if len(samples) != 1:
        raise ValueError(
            f"each sample of this data is a whole batch, and a step asks for {len(samples)} at once: set "
            "run.batch_size to run.accumulation times the number of processes; data.arguments says how large it is"
        )
    return samples[0]


SOURCES = {
    "blobs": Source(BlobLatents, collate_blobs, held_out=512),
    "scene_pictures": Source(ScenePictures, collate_pictures, held_out=16),
    "scene_sentences": Source(SceneSentences, collate_sentences, held_out=512),
    "scene_readings": Source(SceneReadings, collate_readings, held_out=64),
    "scene_frames": Source(SceneFrames, only_batch, held_out=8, whole_batches=True),
    "own_pictures": Source(OwnPictures, only_batch, held_out=8, whole_batches=True),
    "scene_conditions": Source(SceneConditions, only_batch, held_out=4, whole_batches=True),
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
        whole=source.whole_batches,
    )
    if not recipe.run.evaluate_every:
        return batches, []
    unseen = source.dataset(**{**config.arguments, "split": "heldout"})
    samples = [unseen[i] for i in range(source.held_out)]
    groups = [[sample] for sample in samples] if source.whole_batches else [samples]
    return batches, [source.collate(group) for group in groups]
