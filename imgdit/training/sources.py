"""What the data of a recipe is: the name in its `data` section, and the batches that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from imgdit.io.order import Batches, MapDataset
from imgdit.recipes import check_arguments, find_object
from imgdit.training.mmada import MMaDAData, MMaDASettings
from imgdit.training.recipe import Recipe
from imgdit.training.text_pairs import UserTextPairs, collate_text_pairs
from imgdit.training.text_rows import UserTexts, collate_text_rows
from imgdit.training.toy_data import BlobLatents, collate_blobs
from imgdit.training.user_images import UserImages, UserImagesSettings
from imgdit.training.vision_language import UserDialogues, collate_vision_rows


class Source(NamedTuple):
    """One kind of data."""

    dataset: Callable[..., MapDataset]
    """Class of the data set. A recipe's `data.arguments` are its keyword arguments, or those of `settings`."""
    collate: Callable[[list[Any]], Any]
    """Its samples to a batch."""
    held_out: int
    """Samples of the held-out split that the held-out loss is measured on."""
    whole_batches: bool = False
    """Whether a sample is a batch already."""
    settings: Callable[..., Any] | None = None
    """Class of the data set's only argument, where it has one."""

    def open(self, arguments: Mapping[str, Any]) -> MapDataset:
        """The data set of a recipe's `data.arguments`.

        Raises:
            ValueError: arguments that it does not take.
        """
        check_arguments(self.settings or self.dataset, arguments, "data.arguments")
        return self.dataset(**arguments) if self.settings is None else self.dataset(self.settings(**arguments))


def only_batch(samples: Sequence[Any]) -> Any:
    """The only sample, which is a batch already."""
    if len(samples) != 1:
        raise ValueError(
            f"each sample of this data is a whole batch, and a step asks for {len(samples)} at once: set "
            "run.batch_size to run.accumulation times the number of processes; data.arguments says how large it is"
        )
    return samples[0]


class InTurn:
    """Endless: the samples of two endless data sets in turn, such as images and texts about images."""

    def __init__(self, first: MapDataset, second: MapDataset):
        self.sets = (first, second)

    def __getitem__(self, index: int) -> Any:
        return self.sets[index % 2][index // 2]


toy = Source(BlobLatents, collate_blobs, held_out=512)
user_images = Source(UserImages, only_batch, held_out=8, whole_batches=True, settings=UserImagesSettings)
user_texts = Source(UserTexts, collate_text_rows, held_out=32)
user_text_pairs = Source(UserTextPairs, collate_text_pairs, held_out=32)
user_dialogues = Source(UserDialogues, collate_vision_rows, held_out=1)
mmada = Source(MMaDAData, only_batch, held_out=4, whole_batches=True, settings=MMaDASettings)

SOURCES = {
    name: f"imgdit.training.sources:{name}"
    for name in ("toy", "user_images", "user_texts", "user_text_pairs", "user_dialogues", "mmada")
}
"""Short names of `data.name`."""


def source_of(recipe: Recipe) -> Source:
    """The data that a recipe names.

    Raises:
        ValueError: no such data.
    """
    found = find_object(recipe.data.name, SOURCES, "imgdit.data", "data.name is")
    if not isinstance(found, Source):
        raise ValueError(f"data.name must name an imgdit.training.sources.Source, got {found!r}")
    return found


def training_batches(recipe: Recipe) -> tuple[Batches, list[Any]]:
    """The batches of a recipe, and those of its held-out loss.

    Raises:
        ValueError: no such data, or arguments that it does not take.
    """
    config, source = recipe.data, source_of(recipe)
    batches = Batches(
        source.open(config.arguments),
        source.collate,
        seed=recipe.run.seed,
        shuffle=config.shuffle,
        workers=config.workers,
        whole=source.whole_batches,
    )
    if not recipe.run.evaluate_every:
        return batches, []
    unseen = source.open({**config.arguments, "split": "heldout"})
    samples = [unseen[i] for i in range(source.held_out)]
    groups = [[sample] for sample in samples] if source.whole_batches else [samples]
    return batches, [source.collate(group) for group in groups]
