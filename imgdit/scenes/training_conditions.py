"""Data of condition adapters: a scene's image and the condition that a LoRA reads (OminiControl)."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from random import Random
from typing import Any, Literal

import torch

from imgdit.checkpoints import EMBEDDED
from imgdit.frames import Frame
from imgdit.images.latents import encode_images
from imgdit.io.order import mixed_seed
from imgdit.models.functional import PATCH, pack
from imgdit.naming import check_choice, check_name
from imgdit.scenes.captions import caption
from imgdit.scenes.latents import LOOKS, MAPS, OTHERS, VIEWS, scene_views
from imgdit.scenes.training_frames import CachedScenes, Sample, scene_components
from imgdit.scenes.world import STYLES, pick
from imgdit.training.batches import Batch
from imgdit.training.recipe import ADAPTER

CONDITION_TASKS = (*MAPS, *OTHERS, "subject", "style_reference")
"""What a condition may be, by the names of `data.tasks`."""

NAMELESS = 0.75
"""Fraction of the captions about a given subject that do not say what it is."""


class SceneConditions(CachedScenes):
    """Endless: sample i is a `Batch` of [image, condition], the same for the same i.

    Args:
        task: what the condition is, one of `CONDITION_TASKS`.
        mode: "independent": the condition sees only itself, so its keys and values can be cached; "joint": everything.
        position: "aligned": on the image; "subject": to its left.
        model: pipeline folder of the autoencoder and text encoder; "embedded" for the one that comes along.
        latents: folder of the cache, see `data.latents`.
        scenes: training scenes in it.
        samples: images of a batch.
        split: "train" or "heldout".
    """

    def __init__(
        self,
        task: str = "depth",
        mode: Literal["independent", "joint"] = "independent",
        position: Literal["aligned", "subject"] = "aligned",
        model: str = EMBEDDED,
        latents: str = "outputs/scenes/latents",
        scenes: int = 6144,
        samples: int = 32,
        split: str = "train",
    ):
        check_name("task", task, CONDITION_TASKS)
        check_choice("mode", mode, ("independent", "joint"))
        check_choice("position", position, ("aligned", "subject"))
        vae, text_encoder, tokenizer = scene_components(model)
        scale = vae.config.scaling_factor
        super().__init__(vae, text_encoder, tokenizer, latents, scenes, split, scale=scale)
        self.task, self.samples = task, samples
        self.frames = [
            Frame(self.size),
            Frame(
                self.size,
                sigma=0.0,
                adapter=ADAPTER,
                sees="self" if mode == "independent" else "joint",
                offset=(0.0, 0.0) if position == "aligned" else (0.0, -float(self.size[1])),
            ),
        ]
        black = torch.full((1, 3, *(n * PATCH * vae.spatial_compression_ratio for n in self.size)), -1.0)
        with torch.no_grad():
            self.black = pack(encode_images(vae, black), PATCH)[0]  # what a dropped condition becomes

    def __getitem__(self, index: int) -> Batch:
        rng = Random(mixed_seed(index, 0))
        batch = self.batch([self._sample(rng) for _ in range(self.samples)], self.frames)
        return replace(batch, empty_tokens=torch.cat([torch.zeros_like(self.black), self.black]))

    def _sample(self, rng: Random) -> Sample:
        scene, view, look = self.draw(rng)
        if self.task in MAPS:
            condition = self.latent(scene, "maps", view, MAPS.index(self.task))
        elif self.task in OTHERS:
            scene, view = pick(rng, self._others)
            look, condition = 0, self.latent(scene, "others", view)
        elif self.task == "subject":  # the same objects elsewhere: only the first two looks share their colours
            look = pick(rng, (0, 1))
            condition = self.latent(scene, "pictures", 1 - view, 1 - look)
        else:
            style = scene_views(scene, self.split).looks[view][look].style
            condition = self.latent(*pick(rng, self._styled[style]))
        shown = scene_views(scene, self.split).looks[view][look]
        if self.task == "subject" and rng.random() < NAMELESS:
            text = caption(shown, rng, ["subject"])
        else:
            text = self.draw_caption(rng, shown)
        return Sample([self.latent(scene, "pictures", view, look), condition], text)

    @cached_property
    def _others(self) -> list[tuple[int, int]]:
        """Scenes and views whose other condition is of the task."""
        return [
            (scene, view)
            for scene in range(self.scenes)
            for view, task in enumerate(scene_views(scene, self.split).others)
            if task == self.task
        ]

    @cached_property
    def _styled(self) -> dict[str, list[tuple[Any, ...]]]:
        """Places of images of each style."""
        places: dict[str, list[tuple[Any, ...]]] = {style: [] for style in STYLES}
        for scene in range(self.scenes):
            looks = scene_views(scene, self.split).looks
            for view in range(VIEWS):
                for look in range(LOOKS):
                    places[looks[view][look].style].append((scene, "pictures", view, look))
        return places
