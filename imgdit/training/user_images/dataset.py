"""A backbone's or an adapter's data: people's own images, through caches.

Every sample is a whole batch of one bucket, so its images have one size. An epoch holds every usable row once, or as
often as its `repeats` say: the rows of a bucket are shuffled and cut into batches, of which the last may be smaller,
and the batches of all buckets are shuffled. What stands where depends on the seed and the epoch alone, so a run goes
on at the exact batch on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from imgdit.frames import Frame
from imgdit.images.fitting import Size
from imgdit.io.order import mixed_seed
from imgdit.layout import FrameLayout
from imgdit.models.functional import PATCH, pack
from imgdit.training.batches import Batch, Text
from imgdit.training.recipe import ADAPTER
from imgdit.training.user_images.index import UserImageIndex
from imgdit.training.user_images.row_encoder import RowEncoder
from imgdit.training.user_images.settings import UserImagesSettings


class UserImages:
    """Endless: sample i is a `Batch`, the same for the same i. What the caches lack is computed first.

    Args:
        settings: of the data.

    Raises:
        ValueError: no data there, too many broken rows, no condition for a row, fewer rows than a batch takes, or a
            cache of another model.
    """

    def __init__(self, settings: UserImagesSettings):
        self.settings = settings
        self.row_encoder = RowEncoder(settings)
        self.token_side = self.row_encoder.encoder.cell * PATCH
        """Pixels of a token's side."""
        self.index = UserImageIndex(settings, self.token_side)
        self.row_encoder.open_caches()
        if self.row_encoder.caches is not None and settings.ahead:
            self.fill_all()

    def __getitem__(self, index: int) -> Batch:
        settings, numbers = self.settings, self.index.rows_of(index)
        images = [self.index.images[number] for number in numbers]
        size = images[0].bucket
        epoch = index // self.index.batches_per_epoch
        captions = []
        for number, image in zip(numbers, images):
            choices = self.row_encoder.captions(image.row)
            captions.append(choices[Random(mixed_seed(settings.seed, epoch, number)).randrange(len(choices))])
        frames = [torch.stack(grids) for grids in zip(*(self.row_encoder.frames(image) for image in images))]
        text, empty = self._texts(captions)
        layout = self.layout(size, text.embeddings.shape[1])
        batch = Batch(torch.cat([pack(frame, PATCH) for frame in frames], dim=1), layout, text, empty)
        if settings.condition is None or settings.mode == "frame":
            return batch
        black = pack(self.row_encoder.black(size)[None], PATCH)[0]
        return replace(batch, empty_tokens=torch.cat([torch.zeros_like(black)] * (len(layout.frames) - 1) + [black]))

    def layout(self, size: Size, text_length: int) -> FrameLayout:
        """The layout of images of a size, width and height in pixels, with so many text tokens."""
        grid = (size[1] // self.token_side, size[0] // self.token_side)
        return FrameLayout.build(self._frames(grid), text_length)

    def fingerprint(self) -> torch.Tensor:
        """(N, 2) int64: hashes of name and content of each row, by which a run that goes on knows them again."""
        return self.index.fingerprint()

    def fill_all(self) -> None:
        """Compute what the caches lack. Several processes on a machine take turns: the first does the work."""
        assert self.row_encoder.caches is not None
        if self._uncached():
            with self.row_encoder.caches.latents.filling(), self.row_encoder.caches.texts.filling():
                self.fill(tqdm(self._uncached(), desc="caching", unit="row", disable=None))
        self.row_encoder.encoder.unload()

    def fill(self, numbers: Iterable[int]) -> None:
        """Compute what the caches lack of some rows. Several processes may do so at once."""
        for number in numbers:
            self.row_encoder.fill(self.index.images[number])
        self.row_encoder.text("")
        self.row_encoder.flush()

    def _uncached(self) -> list[int]:
        """Rows of which something is not cached."""
        return [number for number, image in enumerate(self.index.images) if not self.row_encoder.is_cached(image)]

    def _frames(self, size: tuple[int, int]) -> list[Frame]:
        """The frames with `size` rows and columns of tokens; the first camera's rays say nothing new and are clean."""
        settings = self.settings
        count = settings.views * (2 if settings.cameras else 1)
        clean = 1 if settings.cameras else None
        frames = [Frame(size, sigma=0.0 if n == clean else None, index=float(n)) for n in range(count)]
        if settings.condition is None:
            return frames
        if settings.mode == "frame":
            return [*frames, Frame(size, index=float(count))]
        sees: Any = "self" if settings.mode == "independent" else "joint"
        offset = (0.0, 0.0) if settings.position == "aligned" else (0.0, -float(size[1]))
        return [*frames, Frame(size, sigma=0.0, adapter=ADAPTER, sees=sees, offset=offset)]

    def _texts(self, captions: Sequence[str]) -> tuple[Text, Text]:
        """Text of the captions, and the empty one of the same length."""
        encoded = [self.row_encoder.text(caption) for caption in [*captions, ""]]
        lengths = [len(one.embeddings) for one in encoded]
        padded = torch.nn.utils.rnn.pad_sequence([one.embeddings.float() for one in encoded], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        masks = [one.mask for one in encoded if one.mask is not None]
        if masks:  # of texts that are padded to one length
            mask = torch.stack(masks)
        whole = Text(padded, torch.stack([one.pooled.float() for one in encoded]), mask)
        if mask.all():  # models without a mask read their padding too
            whole = replace(whole, mask=None)
        return whole.rows(slice(None, -1)), whole.rows(slice(-1, None))
