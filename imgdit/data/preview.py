"""A contact sheet: scenes drawn by lot over their sentences."""

from __future__ import annotations

import textwrap
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from .captions import caption
from .render import render
from .scenes import Scene
from .tasks import from_scene, to_image

LINES = 4
MARGIN = 8


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
        out: a picture file, or a folder that gets `scenes.png`.
        count: scenes, with the seeds `seed`, `seed + 1` and so on.
        seed: of the first.
        split: of `Scene.sample`.
        size: pixels per side of a picture.
        columns: pictures in a row.
        task: a key of `TASKS`: show its condition at the left of every picture.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"a sheet needs at least one picture and one column, got count={count}, columns={columns}")
    tiles = []
    for number in range(seed, seed + count):
        scene, rng = Scene.sample(number, split), Random(number)
        rendering = render([scene], size)
        pictures = [to_image(rendering.rgb[0])]
        if task is not None:
            condition = to_image(from_scene(task, scene, rng, rendering).condition)
            pictures.insert(0, condition.resize((size, size), Image.Resampling.NEAREST))
        tiles.append((pictures, caption(scene, rng)))

    font = ImageFont.load_default(size=10)
    width = size * len(tiles[0][0])
    line = 12
    cell = (width + MARGIN, size + LINES * line + MARGIN)
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, -(-count // columns) * cell[1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pictures, sentence) in enumerate(tiles):
        x, y = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        for k, picture in enumerate(pictures):
            sheet.paste(picture, (x + k * size, y))
        for row, text in enumerate(textwrap.wrap(sentence, max(8, round(width / 5.2)))[:LINES]):
            pen.text((x, y + size + row * line), text, fill="black", font=font)

    out = Path(out)
    path = out if out.suffix else out / "scenes.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
