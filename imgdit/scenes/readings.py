"""Scenes as images with what is to be read in them, for a probe."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from imgdit.scenes.answers import SLOTS, answers
from imgdit.scenes.geometry import geometry
from imgdit.scenes.shading import shade
from imgdit.scenes.tasks import scene_classes
from imgdit.scenes.world import Scene, another_look, between, pick

QUESTIONS = {name: choices for name, choices in SLOTS.items() if name != "task"}
"""What a probe is asked of an image; the left object is the only one if there is one."""


class Sample(NamedTuple):
    """K images of one scene's geometry, and one of nothing."""

    pixels: torch.Tensor
    """(K + 1, 3, S, S) in [-1, 1]."""
    answers: torch.Tensor
    """(K + 1, Q) number of the right answer of each of `QUESTIONS`; "nothing" throughout for the last image."""
    depth: torch.Tensor
    """(1, 1, S, S) z-depth of the K images."""
    classes: torch.Tensor
    """(1, S, S) segmentation of the K images."""


class SceneReadings:
    """Endless: sample i is of the scene with seed `first_seed + i`.

    Half of the images are softened or get some noise, as a generator's have; renders as they are in "heldout".

    Args:
        first_seed: of the scenes.
        split: "train", "heldout" or "heldout_triples", see `Scene.sample`.
        looks: images of each scene, K.
        size: pixels per side.
    """

    def __init__(self, first_seed: int = 0, split: str = "train", looks: int = 3, size: int = 128):
        self.first_seed, self.split, self.looks, self.size = first_seed, split, looks, size

    def __getitem__(self, index: int) -> Sample:
        seed = self.first_seed + index
        scene, rng = Scene.sample(seed, self.split), Random(seed)
        generator = torch.Generator().manual_seed(seed)
        buffers = geometry([scene], self.size, oversample=2)
        scenes = [scene, *(another_look(scene, rng, recolour=self.split == "train") for _ in range(self.looks - 1))]
        images = [shade(buffers, [look])[0] for look in scenes]
        nothing = _nothing(pick(rng, images), rng, generator)
        if self.split == "train":
            images = [_worn(image, rng, generator) for image in images]
        pixels = buffers.at_pixels()
        return Sample(
            pixels=torch.stack([*images, nothing]) * 2 - 1,
            answers=torch.tensor([answers(look)[: len(QUESTIONS)] for look in scenes] + [_NOTHING]),
            depth=pixels.depth,
            classes=scene_classes(scene, pixels.indices),
        )


_NOTHING = answers(None)[: len(QUESTIONS)]


def _worn(image: torch.Tensor, rng: Random, generator: torch.Generator) -> torch.Tensor:
    """The image, perhaps a little blurred, noisy or off in colour."""
    if rng.random() < 0.5:
        return image
    shorter = round(image.shape[-1] * between(rng, 0.45, 0.9))
    soft = F.interpolate(image[None], shorter, mode="bilinear", antialias=True)
    soft = F.interpolate(soft, image.shape[-1], mode="bicubic")[0]
    noise = torch.randn(image.shape, generator=generator) * between(rng, 0.0, 0.04)
    gain = 1 + (torch.rand(3, 1, 1, generator=generator) - 0.5) * 0.12
    return (soft * gain + noise).clamp(0, 1)


def _nothing(image: torch.Tensor, rng: Random, generator: torch.Generator) -> torch.Tensor:
    """What shows none of the objects: clouds of colour, tiles in disorder, or an image beyond recognition."""
    size, kind = image.shape[-1], pick(rng, ("clouds", "tiles", "blur"))
    if kind == "clouds":
        coarse = torch.rand(1, 3, *[pick(rng, (3, 5, 9, 17, 33))] * 2, generator=generator)
        return F.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 1)
    if kind == "tiles":
        side = size // 8
        tiles = F.unfold(image[None], side, stride=side)
        order = torch.randperm(tiles.shape[-1], generator=generator)
        return F.fold(tiles[..., order], size, side, stride=side)[0]
    coarse = F.interpolate(image[None], pick(rng, (3, 4, 5)), mode="bilinear", antialias=True)
    return F.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 1)
