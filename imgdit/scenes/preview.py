"""A contact sheet: scenes drawn at random over their captions."""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image

from imgdit.images import to_image
from imgdit.images.sheet import contact_sheet
from imgdit.scenes.captions import caption
from imgdit.scenes.render import render
from imgdit.scenes.tasks import from_scene
from imgdit.scenes.world import Scene


def preview(
    out: Path,
    count: int = 24,
    seed: int = 0,
    *,
    split: str = "train",
    size: int = 128,
    columns: int = 6,
    task: str | None = None,
) -> Path:
    """Draw a sheet and return where it is.

    Args:
        out: an image file, or a folder that gets `scenes.png`.
        count: scenes, with the seeds `seed`, `seed + 1` and so on.
        seed: of the first.
        split: of `Scene.sample`.
        size: pixels per side of an image.
        columns: images in a row.
        task: a key of `SCENE_TASKS`: show its condition at the left of every image.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"a sheet needs at least one image and one column, got count={count}, columns={columns}")
    tiles = []
    for number in range(seed, seed + count):
        scene, rng = Scene.sample(number, split), Random(number)
        rendering = render([scene], size)
        images = [to_image(rendering.rgb[0])]
        if task is not None:
            condition = to_image(from_scene(task, scene, rng, rendering).condition)
            images.insert(0, condition.resize((size, size), Image.Resampling.NEAREST))
        tiles.append((images, caption(scene, rng)))

    sheet = contact_sheet(tiles, columns)
    out = Path(out)
    path = out if out.suffix else out / "scenes.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
