"""The backbone's data without an end: scenes that are rendered and encoded while the backbone trains.

With `data.workers` processes of torch's `DataLoader` render ahead of the training, at most two batches each. Which
scenes a batch shows depends on its number alone, so a run goes on at the exact batch.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from imgdit.checkpoints import EMBEDDED
from imgdit.io.order import mixed_seed
from imgdit.models.functional import PATCH
from imgdit.naming import check_name
from imgdit.recipes import check_arguments
from imgdit.scenes.latents import LOOKS, SIZE, VIEWS, encode_scene
from imgdit.scenes.training_frames import (
    PAIRS,
    PROBABILITIES,
    SceneFrames,
    checked_probabilities,
    choose,
    scene_components,
)
from imgdit.scenes.world import SPLITS, pick
from imgdit.training.batches import Batch
from imgdit.training.sources import InTurn

FIRST = 1_000_000
"""Seed of the stream's first scene, beyond those that are cached."""
LEAST, STEP = 64, 32
"""Pixels that the sides of images have at least, and that they are multiples of."""
SQUARE = ("views", "cameras")
"""Kinds of batches whose images are squares: rays of cameras are."""


class SceneStream:
    """Endless: sample i is a `Batch` of the kinds of `SceneFrames`, of scenes that no other sample shows.

    Args:
        model: pipeline folder of the autoencoder and text encoder, "embedded" for the one that comes along.
        fresh: scenes rendered for each batch. Each is rendered in two views and three looks, so a batch with more than
            six images per scene shows some twice, under other captions.
        sizes: least and greatest pixels of a side, multiples of 32 from 64 on. Each batch has one shape, whose sides
            are drawn apart; the shorter side has the cameras' field of view. Batches with cameras are square.
        first: seed of the first scene.
        tokens, probabilities, pairs, maps: see `SceneFrames`.
        split: "train" or "heldout".

    Raises:
        ValueError: a number out of range, or as `SceneFrames`.
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        fresh: int = 4,
        sizes: tuple[int, int] = (SIZE, SIZE),
        first: int = FIRST,
        tokens: int = 4096,
        probabilities: dict[str, float] = PROBABILITIES,
        pairs: dict[str, float] = PAIRS,
        maps: bool = False,
        split: str = "train",
    ):
        least, greatest = sizes
        if least % STEP or greatest % STEP or not LEAST <= least <= greatest:
            raise ValueError(
                f"sizes are the least and the greatest side, multiples of {STEP} pixels from {LEAST} on, such as "
                f"[96, 192]; got {sizes}"
            )
        if fresh < 1 or first < 0:
            raise ValueError(f"a batch needs a scene, and seeds start at 0; got fresh={fresh}, first={first}")
        check_name("split", split, SPLITS)
        self.vae, self.text_encoder, self.tokenizer = scene_components(model)
        self.fresh, self.first, self.split = fresh, first, split
        self.sides = tuple(range(least, greatest + 1, STEP))
        self.tokens, self.pairs, self.maps = tokens, pairs, maps
        self.probabilities = checked_probabilities(probabilities, pairs)

    def __getitem__(self, index: int) -> Batch:
        rng = Random(mixed_seed(index, 1))
        kind = choose(rng, self.probabilities)
        rows, columns = pick(rng, self.sides), pick(rng, self.sides)
        if kind in SQUARE:
            columns = rows
        start = self.first + index * self.fresh
        return _FreshScenes(self, range(start, start + self.fresh), (rows, columns)).draw_batch(kind, rng)


class _FreshScenes(SceneFrames):
    """`SceneFrames` over a few scenes that are rendered when they are read."""

    def __init__(self, stream: SceneStream, seeds: range, sides: tuple[int, int]):
        self.seeds, self.sides, self.vae = seeds, sides, stream.vae
        self.split, self.scale = stream.split, stream.vae.config.scaling_factor
        self.text_encoder, self.tokenizer = stream.text_encoder, stream.tokenizer
        self.tokens, self.probabilities, self.pairs = stream.tokens, stream.probabilities, stream.pairs
        self.maps = stream.maps
        cell = PATCH * stream.vae.spatial_compression_ratio
        self.size = (sides[0] // cell, sides[1] // cell)
        self._encoded: dict[int, dict[str, torch.Tensor]] = {}

    def latent(self, scene: int, name: str, *place: int) -> torch.Tensor:
        if scene not in self._encoded:
            self._encoded[scene] = encode_scene(self.vae, scene, self.split, self.sides)
        return self._encoded[scene][name][place].float() * self.scale

    def draw(self, rng: Random) -> tuple[int, int, int]:
        return pick(rng, self.seeds), pick(rng, range(VIEWS)), pick(rng, range(LOOKS))


class SceneFramesAndStream(InTurn):
    """Endless: batches of `SceneFrames`, from a cache, and of `SceneStream` in turn: the stream has the time of two
    steps for a batch.

    Args:
        frames, stream: arguments of both; `split`, `model` and `maps` hold for both.
        model: pipeline folder of the autoencoder and text encoder.
        maps: see `SceneFrames`.
        split: "train" or "heldout".
    """

    def __init__(
        self,
        frames: dict[str, Any] | None = None,
        stream: dict[str, Any] | None = None,
        model: str = EMBEDDED,
        maps: bool = False,
        split: str = "train",
    ):
        check_arguments(SceneFrames, frames or {}, "data.arguments.frames")
        check_arguments(SceneStream, stream or {}, "data.arguments.stream")
        shared: dict[str, Any] = {"model": model, "maps": maps, "split": split}
        super().__init__(SceneFrames(**{**shared, **(frames or {})}), SceneStream(**{**shared, **(stream or {})}))
