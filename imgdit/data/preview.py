"""A contact sheet of people's own data."""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image

from imgdit.data.opening import decode_image
from imgdit.data.rows import Rows
from imgdit.images.fitting import fit
from imgdit.images.sheet import contact_sheet


def draw_sheet(rows: Rows, out: Path, count: int = 24, seed: int = 0, size: int = 128, columns: int = 6) -> Path:
    """A contact sheet of rows drawn at random: conditions and frames beside the image, over a caption.

    Raises:
        ValueError: none of the rows that were drawn can be read.
    """
    tiles: list[tuple[list[Image.Image], str]] = []
    for row in Random(seed).sample(rows.rows, len(rows.rows)):
        if len(tiles) == count:
            break
        try:
            blobs = [*row.conditions.values(), row.image, *row.frames]
            images = [fit(decode_image(blob.read()).image, (size, size)) for blob in blobs]
        except (ValueError, OSError):
            continue  # `check` names them
        tiles.append((images, row.captions[0] if row.captions else "(no caption)"))
    if not tiles:
        raise ValueError(f"{rows.source} has no image that can be read; `imgdit data check` says why")
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(tiles, columns, size, title=f"{rows.source}: {len(rows.rows):,} rows").save(out)
    return out
