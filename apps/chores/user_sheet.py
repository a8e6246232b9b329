"""A sheet of what a model makes of people's own images while it trains: condition, generated image, image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from imgdit.images import to_image
from imgdit.images.latents import decode_latents
from imgdit.images.sheet import contact_sheet
from imgdit.models.functional import PATCH, unpack
from imgdit.training.build import build_scheduler
from imgdit.training.recipe import Recipe
from imgdit.training.sampling import sample_first_frame
from imgdit.training.user_images import UserImages
from imgdit.training.user_images.settings import settings_of

IMAGES, STEPS = 4, 20
"""Rows of a sheet, and the sampler's steps."""


class UserSheet:
    """Called with the number of a step, writes `samples/step-….png` into the run's folder: for some images of the data
    their conditions, what the model generates from these, the same noise and the caption, and the images themselves.

    Args:
        recipe: of the run, on the data "user_images".
        model: that is being trained, in the class `MMDiT` or `NextDiT`.
        dataset: of the run.
    """

    def __init__(self, recipe: Recipe, model: Any, dataset: UserImages):
        self.recipe, self.model, self.dataset = recipe, model, dataset
        self.folder = Path(recipe.run.folder) / "samples"
        self.shift = float(getattr(build_scheduler(recipe).config, "shift", 1.0) or 1.0)
        self.guidance = float(recipe.objective.arguments.get("guidance", 1.0))

    def __call__(self, step: int) -> Image.Image | None:
        tiles: list[tuple[list[Image.Image], str]] = []
        for number in range(self.dataset.index.batches_per_epoch):
            tiles += self._tiles(number)[: IMAGES - len(tiles)]
            if len(tiles) == IMAGES:
                break
        if not PartialState().is_main_process:  # every rank computes: a sharded model needs them all
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        what = "conditions, generated, image" if settings_of(self.recipe).condition else "generated, image"
        sheet = contact_sheet(tiles, columns=1, size=max(tiles[0][0][0].size), title=f"step {step}: {what}")
        sheet.save(self.folder / f"step-{step:08d}.png")
        return sheet

    def _tiles(self, number: int) -> list[tuple[list[Image.Image], str]]:
        """A row of images for each sample of a batch."""
        device = next(self.model.parameters()).device
        batch = self.dataset[number].to(device)
        generator = torch.Generator().manual_seed(number)
        generated = sample_first_frame(
            self.model, batch, steps=STEPS, generator=generator, shift=self.shift, guidance=self.guidance
        )
        image, *conditions = batch.tokens.split(batch.layout.lengths, dim=1)
        frames = batch.layout.frames
        shown = [self._images(tokens, frame.size) for tokens, frame in zip(conditions, frames[1:])]
        shown += [self._images(tokens, frames[0].size) for tokens in (generated, image)]
        rows = self.dataset.index.rows_of(number)
        names = [self.dataset.index.images[row].row.name for row in rows]
        return [(list(images), name) for images, name in zip(zip(*shown), names)]

    def _images(self, tokens: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
        vae = self.dataset.row_encoder.encoder.pipe.vae
        latents = unpack(tokens, PATCH, size).to(vae.device)
        return [to_image(image) for image in decode_latents(vae, latents) / 2 + 0.5]


def draws_sheets(recipe: Recipe, model: Any) -> bool:
    """Whether a run's model can be shown: a class of other libraries has no decoder of its tokens here."""
    return getattr(settings_of(recipe), "cameras", False) is False and type(model).__name__ in ("MMDiT", "NextDiT")
