"""A task that every machine has and a tiny model learns in seconds: latents of jittered Gaussian blobs.

What decides whether a learning rate is good must be visible after a hundred steps: the image depends on its text (a
class), every sample is new, and the best rate is a real optimum with worse ones on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from imgdit.frames import Frame
from imgdit.io.order import mixed_seed
from imgdit.layout import FrameLayout
from imgdit.naming import check_choice
from imgdit.training.batches import Batch, Text

SIDE, PATCH, CHANNELS = 8, 2, 4  # latent cells, cells of a token's side, channels
CLASSES, BLOBS = 8, 2
TEXT_TOKENS, FEATURES = 4, 32
TOKEN_CHANNELS = CHANNELS * PATCH**2
_JITTER = 0.7  # cells by which a blob moves from sample to sample
_SPLITS = ("train", "heldout")


class Blob(NamedTuple):
    """One sample."""

    tokens: torch.Tensor
    """(16, 16): tokens of an 8x8 latent with 4 channels, features in the order (channel, row, column)."""
    label: int
    """Its class."""


class BlobLatents:
    """Endless samples: each class has its own blobs, each sample moves them."""

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        """
        Args:
            split: "train" or "heldout"; they share the classes and no sample.
            seed: decides the classes.
        """
        check_choice("split", split, _SPLITS)
        generator = torch.Generator().manual_seed(mixed_seed(seed, CLASSES))
        shape = (CLASSES, BLOBS)
        self.centres = 1.0 + (SIDE - 3.0) * torch.rand(*shape, 2, generator=generator)
        self.widths = 1.0 + torch.rand(*shape, generator=generator)
        self.colours = 2.5 * torch.randn(*shape, CHANNELS, generator=generator)
        self.seed, self.split = seed, _SPLITS.index(split)

    def __getitem__(self, index: int) -> Blob:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.split, index))
        label = int(torch.randint(CLASSES, (), generator=generator))
        centres = self.centres[label] + _JITTER * torch.randn(BLOBS, 2, generator=generator)
        cells = torch.arange(SIDE) + 0.0
        distance = (cells - centres[..., None]).square()  # (blobs, 2, side)
        squared = distance[:, 0, :, None] + distance[:, 1, None, :]  # (blobs, side, side)
        shapes = torch.exp(-squared / (2 * self.widths[label, :, None, None] ** 2))
        latent = torch.einsum("bc,bhw->chw", self.colours[label], shapes)
        count = SIDE // PATCH
        patches = latent.reshape(CHANNELS, count, PATCH, count, PATCH).permute(1, 3, 0, 2, 4)
        return Blob(patches.reshape(count * count, TOKEN_CHANNELS), label)


def collate_blobs(samples: Sequence[Blob]) -> Batch:
    """A batch whose text is a fixed random vector per class and position."""
    tokens = torch.stack([sample.tokens for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    table = torch.randn(CLASSES, TEXT_TOKENS + 1, FEATURES, generator=torch.Generator().manual_seed(CLASSES))
    words, pooled = table[labels].split([TEXT_TOKENS, 1], dim=1)
    empty = Text(torch.zeros(1, TEXT_TOKENS, FEATURES), torch.zeros(1, FEATURES))
    side = SIDE // PATCH
    return Batch(tokens, FrameLayout.build([Frame((side, side))], TEXT_TOKENS), Text(words, pooled[:, 0]), empty)
