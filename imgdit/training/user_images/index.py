"""Which of people's images are trained on, in which bucket, and which of them make a batch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from imgdit.data.buckets import bucket_sizes, nearest_bucket
from imgdit.data.control_folder import with_conditions
from imgdit.data.inspections import inspected
from imgdit.data.linter import Inspection
from imgdit.data.listing import some
from imgdit.data.rows import Note, Problem, Row
from imgdit.data.sources import open_rows
from imgdit.images.fitting import Size
from imgdit.images.preprocess import PREPROCESSORS, check_preprocessor
from imgdit.io.order import mixed_seed, row_hash
from imgdit.training.user_images.needs import unfit_views
from imgdit.training.user_images.settings import UserImagesSettings

logger = logging.getLogger(__name__)

SHOWN = 5
"""Problems that a message names; `imgdit data check` lists all."""


class IndexedImage(NamedTuple):
    """A row that can be trained on."""

    row: Row
    inspection: Inspection
    bucket: Size
    """Width and height that it is fitted to, in pixels."""


class UserImageIndex:
    """The usable rows of a split, and the batches of each epoch.

    Args:
        settings: of the data.
        multiple: pixels that the sides of buckets are multiples of.

    Raises:
        ValueError: no data there, too many broken rows, no condition for a row, or fewer rows than a batch takes.
    """

    def __init__(self, settings: UserImagesSettings, multiple: int):
        self.settings = settings
        self.images = self._split_of(self._usable(multiple))
        if settings.condition is not None and settings.preprocessor is None:
            self._check_conditions()
        self.buckets: dict[Size, list[int]] = {}
        """Size -> numbers in `images`, each as often as the row repeats."""
        for number, image in enumerate(self.images):
            self.buckets.setdefault(image.bucket, []).extend([number] * image.row.repeats)
        self.batches_per_epoch = sum(-(-len(rows) // settings.samples) for rows in self.buckets.values())
        self._epoch: tuple[int, list[list[int]]] | None = None

    def rows_of(self, index: int) -> list[int]:
        """Numbers in `images` of the rows of a batch."""
        epoch, place = divmod(index, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches_of(epoch))
        return self._epoch[1][place]

    def _batches_of(self, epoch: int) -> list[list[int]]:
        samples = self.settings.samples
        generator = torch.Generator().manual_seed(mixed_seed(self.settings.seed, epoch))
        batches = []
        for _, rows in sorted(self.buckets.items()):
            shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
            batches += [shuffled[i : i + samples] for i in range(0, len(rows), samples)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def fingerprint(self) -> torch.Tensor:
        """(N, 2) int64: hashes of name and content of each row, by which a run that goes on knows them again."""
        rows = [
            (
                row_hash(row.name),
                row_hash(
                    sorted(found.hashes.items()), row.captions, row.repeats, row.focal_length,
                    None if row.cameras is None else row.cameras.tolist(),
                ),
            )
            for row, found, _ in self.images
        ]  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64)

    def _usable(self, multiple: int) -> list[IndexedImage]:
        """The rows of both splits that can be trained on."""
        settings = self.settings
        if not settings.path:
            raise ValueError("path names the data: a folder with metadata.jsonl, shards, or what `datasets` loads")
        buckets = bucket_sizes(settings.base, multiple, settings.ratio)
        source = open_rows(settings.path, settings.column_names, settings.source_split)
        if settings.control is not None and settings.condition is not None:
            source = with_conditions(source, settings.path, settings.control, settings.condition)
        for problem in source.problems:
            if problem.kind == "shard":
                raise ValueError(problem.message)
        computed = settings.preprocessor is not None and any(
            settings.condition not in row.conditions for row in source.rows
        )
        if settings.ahead and settings.preprocessor is not None and computed:
            check_preprocessor(settings.preprocessor, settings.preprocessor_options)  # before all images are read
        found = inspected(source.rows, settings.least_side, settings.cache)
        checked = [(row, f, f.problem or unfit_views(row, settings)) for row, f in zip(source.rows, found)]
        problems = [*source.problems, *(problem for _, _, problem in checked if problem is not None)]
        images = [
            IndexedImage(row, f, nearest_bucket(f.size, buckets)) for row, f, problem in checked if problem is None
        ]
        _report_problems(settings.path, problems, len(problems) + len(images), settings.max_broken)
        _report_notes(settings.path, source.notes, [image.row for image in images])
        return images

    def _split_of(self, images: Sequence[IndexedImage]) -> list[IndexedImage]:
        """The rows of the split; their content decides where they belong."""
        split, held_out, samples = self.settings.split, self.settings.held_out, self.settings.samples
        chosen = [
            image
            for image in images
            if (_fraction_of(image.inspection.hashes["picture"]) < held_out) == (split == "heldout")
        ]
        usable = sum(image.row.repeats for image in chosen)
        if usable < (samples if split == "train" else 1):
            raise ValueError(
                f"{self.settings.path} has {usable} usable rows in the split {split!r}, a batch takes {samples}; "
                "lower data.arguments.samples, or raise held_out if it is the held-out split that lacks rows"
            )
        return chosen

    def _check_conditions(self) -> None:
        for number, image in enumerate(self.images):
            if self.settings.condition not in image.row.conditions:
                able = ", ".join(PREPROCESSORS)
                raise ValueError(
                    f"{self.settings.path}: row {number}, {image.row.name}, has no condition "
                    f"{self.settings.condition!r} and no preprocessor is named that would compute it; preprocessors "
                    f"are {able}"
                )


def _fraction_of(content: str) -> float:
    """A number in [0, 1) from a content's hash."""
    return int(content[:8], 16) / 2**32


def _report_notes(path: str, notes: Iterable[Note], rows: Sequence[Row]) -> None:
    """Log what was left alone, and which images will be trained on without a caption."""
    for note in notes:
        logger.warning("%s: %s: %s", note.name, note.kind, note.message)
    bare = [row.name for row in rows if not row.captions]
    if bare:
        message = "%s: %s of %s have no caption and are trained with the empty text"
        logger.warning(message, path, some(bare, "image"), f"{len(rows):,}")


def _report_problems(path: str, problems: list[Problem], rows: int, allowed: float) -> None:
    """Log what is left out; refuse if it is too much."""
    if not problems:
        return
    counts = ", ".join(f"{n:,} {kind}" for kind, n in Counter(p.kind for p in problems).most_common())
    first = "; ".join(f"{p.name}: {p.message}" for p in problems[:SHOWN])
    message = f"{path}: {len(problems):,} of {rows:,} rows cannot be used ({counts})"
    if len(problems) > allowed * rows:
        raise ValueError(
            f"{message}, {len(problems) / rows:.1%} where max_broken allows {allowed:.1%}. The first: {first}. "
            f"`imgdit data check {path}` lists all"
        )
    logger.warning("%s and are left out. The first: %s", message, first)
