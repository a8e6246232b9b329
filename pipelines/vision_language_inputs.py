"""What a vision-language pipeline is given: images and prompts of each row, and what it refuses.

B rows, N vectors of an image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from imgdit.images.fitting import Size
from imgdit.images.opening import name_of
from imgdit.images.tiles import Tiling, Video, cut_tiles, read_image
from imgdit.models.image_rows import IMAGE_PLACE
from imgdit.models.image_tokens import ImageProjector
from imgdit.pipelines.dialogues import SpecialTokens, check_messages, dialogue_ids, with_images


class SeenImage(NamedTuple):
    """An image or a video of a row."""

    frames: tuple[Image.Image, ...]
    """RGB; one of an image."""
    shown: Size | Video
    """Size of the image, or the video."""
    length: int
    """N."""

    def tiles(self, tiling: Tiling) -> torch.Tensor:
        """(T, 3, S, S) in [-1, 1]; a video's frames are squashed to one tile each."""
        if isinstance(self.shown, Video):
            return torch.cat([cut_tiles(frame, replace(tiling, mode="square")) for frame in self.frames])
        return cut_tiles(self.frames[0], tiling)


class Row(NamedTuple):
    """A prompt and its images."""

    ids: list[int]
    """Tokens, `IMAGE_PLACE` where an image stands."""
    images: list[SeenImage]


class Answers(NamedTuple):
    """What follows the prompts before anything is written."""

    draft: torch.Tensor
    """(B, G), masks to be revealed, and tokens that stay."""
    suffix: torch.Tensor
    """(B, S), tokens that stay behind."""


def see(image: Any, projector: ImageProjector) -> SeenImage:
    """An image or a video, with the number of its vectors.

    Raises:
        ValueError: it cannot be read, or is of a shape that no tokens are left of.
    """
    if isinstance(image, Video):
        frames = tuple(map(read_image, image.frames))
        if not frames:
            raise ValueError("a video needs at least one frame")
        shown: Size | Video = image
        tiles = len(frames)
    else:
        frames = (read_image(image),)
        shown = frames[0].size
        grid = projector.tiling.grid_of(shown)
        tiles = 1 if grid is None else 1 + grid[0] * grid[1]
    try:
        return SeenImage(frames, shown, projector.lengths([tiles], [shown])[0])
    except ValueError as error:
        raise ValueError(f"{name_of(image)}: {error}") from error


def listed(images: Any) -> list[Any]:
    """Images of several rows as a list; a batch of arrays or tensors is one too."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Video) or not isinstance(images, (list, tuple)):
        return [images]
    if not images:
        raise ValueError("images is an empty list; give at least one, or None")
    return list(images)


def images_of_rows(images: Any) -> list[list[Any]]:
    """Images of each row; a row's own list holds several."""
    found = []
    for one in listed(images):
        several = isinstance(one, (list, tuple)) and not isinstance(one, Video)
        found.append(list(one) if several else [] if one is None else [one])
    return found


def read_rows(
    pipe: Any, images: Any, prompt: Any, messages: Any, input_ids: Any, special: SpecialTokens, vocabulary: int
) -> list[Row]:
    """Rows of a call, see `VisionLanguagePipeline`.

    Raises:
        ValueError: not one of prompt, messages and input_ids, or numbers of them that do not fit.
    """
    if sum(one is not None for one in (prompt, messages, input_ids)) != 1:
        raise ValueError("give one of prompt, messages and input_ids")
    several = images_of_rows(images)
    if input_ids is not None:
        texts: list[Any] = [[int(token) for token in row] for row in input_ids]
    elif prompt is not None:
        asked = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [[{"role": "user", "content": text}] for text in asked]
    else:
        texts = [messages] if messages and isinstance(messages[0], dict) else list(messages)
    count = max(len(texts), len(several))
    if not texts or len(texts) not in (1, count) or len(several) not in (1, count):
        raise ValueError(f"got images for {len(several)} rows and {len(texts)} prompts; give one, or as many")
    seen = [[see(image, pipe.projector) for image in some] for some in several]
    texts, seen = (one * count if len(one) == 1 else one for one in (texts, seen))
    if input_ids is None:
        tokenizer = pipe.tokenizer
        texts = [
            dialogue_ids(tokenizer, with_images(check_messages(text), len(some))) for text, some in zip(texts, seen)
        ]
    for n, ids in enumerate(texts):
        wrong = [token for token in ids if token != IMAGE_PLACE and not 0 <= token < vocabulary]
        if wrong or not ids or special.mask in ids:
            what = f"token {wrong[0]}" if wrong else "mask tokens" if ids else "no token"
            raise ValueError(
                f"prompt {n} has {what}; expected at least one in 0..{vocabulary - 1}, and masks in draft only"
            )
    return [Row(ids, some) for ids, some in zip(texts, seen)]
