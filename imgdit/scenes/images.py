"""Scenes as images for an autoencoder: every look and every kind of map that a frame may hold."""

from __future__ import annotations

from random import Random

import torch

from imgdit.scenes.geometry import geometry
from imgdit.scenes.render import rendering
from imgdit.scenes.shading import shade
from imgdit.scenes.tasks import from_scene
from imgdit.scenes.world import Scene, another_look, pick

# Conditions that look unlike an image; the others (blurred, grey, with a hole) are images, more or less.
MAPS = ("depth", "canny", "segmentation", "boxes", "grey", "mask")


class SceneImages:
    """Endless: sample i is the images (looks + 1, 3, S, S) in [-1, 1] of the scene with seed `first_seed + i`.

    The geometry of a scene costs more than its shading, so each is shaded in several looks, of which the model has a
    use for every one; the last image is one of `MAPS`.

    Args:
        first_seed: of the scenes; a whole data set lies behind every other seed.
        split: "train" or "heldout", see `Scene.sample`.
        looks: images of each scene.
        size: pixels per side.
    """

    def __init__(self, first_seed: int = 0, split: str = "train", looks: int = 3, size: int = 128):
        if looks < 1:
            raise ValueError(f"looks counts the images of each scene and must be at least 1, got {looks}")
        self.first_seed, self.split, self.looks, self.size = first_seed, split, looks, size

    def __getitem__(self, index: int) -> torch.Tensor:
        seed = self.first_seed + index
        scene, rng = Scene.sample(seed, self.split), Random(seed)
        buffers = geometry([scene], self.size, oversample=2)
        seen = rendering(buffers, [scene])
        images = [seen.rgb[0]]
        for _ in range(self.looks - 1):
            images.append(shade(buffers, [another_look(scene, rng)])[0])
        images.append(from_scene(pick(rng, MAPS), scene, rng, seen).condition)
        return torch.stack(images) * 2 - 1
