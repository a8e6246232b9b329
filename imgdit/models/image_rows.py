"""Rows of tokens in which images stand: as many places as an image has vectors.

B rows, L places, d features of the language model, N vectors of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

IMAGE_PLACE = -200
"""Stands in rows of tokens where an image's vectors go, as in LLaVA."""


class ImageVectors(NamedTuple):
    """What stands in a batch of rows in place of tokens' embeddings."""

    vectors: torch.Tensor
    """(B, L, d), zero where there is no image."""
    places: torch.Tensor
    """Boolean (B, L), places of images."""


class JoinedRows(NamedTuple):
    """Rows of tokens in which each image has as many places as it has vectors."""

    ids: torch.Tensor
    """(B, L), a filler at places of images and of padding."""
    images: torch.Tensor
    """Boolean (B, L), places of images, in the order of their vectors."""
    real: torch.Tensor
    """Boolean (B, L), false on padding."""
    source: torch.Tensor
    """(B, L), which entry of the row as given a place comes from; 0 on padding."""

    def vectors(self, images: Sequence[torch.Tensor]) -> ImageVectors:
        """Vectors (N, d) of all images at their places."""
        joined = torch.cat(list(images))
        blank = joined.new_zeros(*self.ids.shape, joined.shape[-1])
        return ImageVectors(blank.masked_scatter(self.images[..., None], joined), self.images)


def join_rows(
    rows: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], filler: int, *, left: bool = False
) -> JoinedRows:
    """Rows of tokens and images as a batch.

    Args:
        rows: tokens, `IMAGE_PLACE` where an image stands.
        lengths: of each row, the number of vectors of each of its images.
        filler: token of places that are padding or an image.
        left: put padding before the rows.

    Raises:
        ValueError: a row has not as many images as places for them.
    """
    sources, images = [], []
    for n, (row, counts) in enumerate(zip(rows, lengths, strict=True)):
        if (places := list(row).count(IMAGE_PLACE)) != len(counts):
            raise ValueError(f"row {n} has {len(counts)} images and {places} places for them; make them equal")
        tokens = torch.tensor(row, dtype=torch.long)
        repeats = torch.ones_like(tokens)
        repeats[tokens == IMAGE_PLACE] = torch.tensor(counts, dtype=torch.long)
        sources.append(torch.arange(len(tokens)).repeat_interleave(repeats))
        images.append(tokens[sources[-1]] == IMAGE_PLACE)
    length = max(map(len, sources))
    shape = (len(rows), length)
    joined = JoinedRows(
        torch.full(shape, filler), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.long),
    )  # fmt: skip
    for n, (row, source, image) in enumerate(zip(rows, sources, images)):
        at = slice(length - len(source), length) if left else slice(0, len(source))
        tokens = torch.tensor(row, dtype=torch.long)[source]
        joined.ids[n, at] = tokens.masked_fill(image, filler)
        joined.images[n, at], joined.real[n, at], joined.source[n, at] = image, True, source
    return joined


def embed_rows(model: Any, ids: torch.Tensor, images: ImageVectors | None) -> torch.Tensor:
    """Input embeddings (B, L, d) of tokens (B, L), with images' vectors at their places.

    Args:
        images: of these places; `None`: there are none.
    """
    layer = model.get_input_embeddings()
    # A model that waits beside its device is fetched when it is called as a whole; single layers fetch themselves.
    place = ids.device if layer.weight.is_meta else layer.weight.device
    embeds = layer(ids.to(place)).to(ids.device)
    if images is None:
        return embeds
    return torch.where(images.places[..., None], images.vectors.to(embeds.dtype), embeds)
