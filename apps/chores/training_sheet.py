"""A sheet of what a backbone of the scenes makes while it trains."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from accelerate import PartialState
from PIL import Image

from imgdit.apps.chores.weights import scene_pipeline
from imgdit.benchmarks.scenes.maker import PipelineMaker
from imgdit.benchmarks.scenes.text_to_image import held_out
from imgdit.images import to_image
from imgdit.images.sheet import contact_sheet
from imgdit.scenes.tasks import depth_to_image
from imgdit.scenes.world import another_camera
from imgdit.training.recipe import Recipe

IMAGES, STEPS = 4, 20
"""Images of each kind, and the sampler's steps."""


class TrainingSheet:
    """Called with the number of a step, writes `samples/step-….png` into the run's folder: images from text, and
    what is given beside what is made of it.

    Args:
        recipe: of the run.
        model: the `MMDiT` that is being trained.
    """

    def __init__(self, recipe: Recipe, model: Any):
        self.maker = PipelineMaker(scene_pipeline(recipe, model), STEPS)
        self.truths = held_out(IMAGES, first_seed=0)
        self.cameras = [(s.camera, another_camera(s, Random(i)).camera) for i, s in enumerate(self.truths.scenes)]
        self.folder = Path(recipe.run.folder) / "samples"

    def __call__(self, step: int) -> Image.Image | None:
        prompts, rgb = self.truths.prompts, self.truths.rendering.rgb
        depth = depth_to_image(self.truths.rendering.depth)
        rows = {
            "text to image": [self.maker.images(prompts, seed=0)],
            "depth to image": [depth, self.maker.conditioned("depth", prompts, depth, seed=0)],
            "views": [rgb, self.maker.views(prompts, rgb, self.cameras, seed=0)],
        }
        for task in ("depth", "canny", "segmentation"):
            rows[f"image to {task}"] = [rgb, self.maker.condition(task, prompts, rgb, seed=0)]
        tiles = [
            ([to_image(images[i]) for images in generated], f"{name}: {prompts[i]}")
            for name, generated in rows.items()
            for i in range(IMAGES)
        ]
        if not PartialState().is_main_process:  # every rank computes: a sharded model needs them all
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(tiles, columns=IMAGES, title=f"step {step}")
        sheet.save(self.folder / f"step-{step:08d}.png")
        return sheet
