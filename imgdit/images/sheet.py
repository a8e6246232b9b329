"""Contact sheets: images over their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE, _LINES = 8, 12, 4


def contact_sheet(
    tiles: Sequence[tuple[Sequence[Image.Image], str]], columns: int = 6, size: int | None = None, title: str = ""
) -> Image.Image:
    """One image of many.

    Args:
        tiles: images that stand side by side, and the caption below them.
        columns: tiles in a row.
        size: pixels per side that images are shown at; that of the first if `None`.
        title: a line above.

    Raises:
        ValueError: no tile or no column.
    """
    if not tiles or columns < 1:
        raise ValueError(f"a sheet needs at least one tile and one column, got {len(tiles)} and {columns}")
    size = size or tiles[0][0][0].width
    font = ImageFont.load_default(size=10)
    width, columns, top = size * max(len(images) for images, _ in tiles), min(columns, len(tiles)), 0
    if title:
        top = _LINE + _MARGIN
    letters = max(8, round(width / 5.2))
    lines = min(_LINES, max(len(textwrap.wrap(caption, letters)) for _, caption in tiles))
    cell = (width + _MARGIN, size + lines * _LINE + _MARGIN)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN + top), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_MARGIN, _MARGIN), title, fill="black", font=ImageFont.load_default(size=12))
    for i, (images, caption) in enumerate(tiles):
        x, y = _MARGIN + i % columns * cell[0], _MARGIN + top + i // columns * cell[1]
        for k, image in enumerate(images):
            shown = image if image.size == (size, size) else image.resize((size, size))
            sheet.paste(shown, (x + k * size, y))
        for row, text in enumerate(textwrap.wrap(caption, letters)[:lines]):
            pen.text((x, y + size + row * _LINE), text, fill="black", font=font)
    return sheet
