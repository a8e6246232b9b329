"""Images as the tiles that a vision tower of a fixed size reads, as LLaVA's relatives cut them ("anyres").

The first tile is the whole image. In mode "anyres" the image is also scaled to fit into a grid of tiles, centred on
black, and cut; the grid is chosen among some by how much of the image's detail it keeps (LLaVA-NeXT; LLaDA-V,
arXiv 2505.16933; LaViDa, arXiv 2505.16839).

T tiles of S x S pixels. Sizes of images are (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from imgdit.images.convert import to_image, to_pixels, to_rgb
from imgdit.images.fitting import Size, check_sides
from imgdit.images.opening import name_of, open_image
from imgdit.naming import check_choice

Mode = Literal["square", "pad", "anyres"]
PADDING = (127, 127, 127)
"""Colour around an image that is padded to a square, 127.5 rounded down."""
MOST_TILES = 64
"""Of a grid; the largest published one has 36."""


class Video(NamedTuple):
    """Frames that stand in a text as one image does."""

    frames: Sequence[Any]
    """Images, at least one."""


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    Raises:
        ValueError: a mode or a grid that is not known, or a grid of too many tiles.
    """

    mode: Mode = "anyres"
    """"square": squashed to one tile; "pad": padded to a square, one tile; "anyres": the whole image and a grid."""
    grids: tuple[Size, ...] = ()
    """Grids of "anyres", in pixels."""
    size: int = 384
    """S."""
    pads_base: bool = False
    """Whether the whole image of "anyres" is padded to a square in place of squashed."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("square", "pad", "anyres"))
        if self.mode == "anyres" and not self.grids:
            raise ValueError("mode 'anyres' needs grids of tiles, got none")
        for width, height in self.grids:
            if width < 1 or height < 1 or width % self.size or height % self.size:
                raise ValueError(f"grids must be multiples of the tower's {self.size} pixels, got {width}x{height}")
            if (tiles := width * height // self.size**2) > MOST_TILES:
                raise ValueError(f"a grid of {width}x{height} pixels is {tiles} tiles, at most {MOST_TILES} are cut")

    def grid_of(self, size: Size) -> Size | None:
        """Columns and rows of tiles that an image of a size is cut into; `None`: it is one tile."""
        if self.mode != "anyres":
            return None
        width, height = best_grid(size, self.grids)
        return width // self.size, height // self.size


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """The grid that keeps most of an image's pixels, with the least area left over; of equal ones the first."""
    width, height = size

    def kept_and_waste(grid: Size) -> tuple[int, int]:
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=kept_and_waste)


def read_image(image: Any) -> Image.Image:
    """Anything that holds one image as 8-bit RGB: a path, a PIL image, or what `to_pixels` takes.

    Raises:
        ValueError: it holds none, or one that is too small or too narrow, see `check_sides`.
    """
    name = name_of(image)
    if isinstance(image, Image.Image):
        found = to_rgb(image)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        pixels = to_pixels(image)
        if len(pixels) != 1:
            raise ValueError(f"got {len(pixels)} images in one tensor of shape {tuple(image.shape)}; give a list")
        found = to_image(pixels[0])
    else:
        found = to_rgb(open_image(image))
    check_sides(found.size, name)
    return found


def cut_tiles(image: Image.Image, tiling: Tiling) -> torch.Tensor:
    """An RGB image as tiles (T, 3, S, S) in [-1, 1], the whole image first, then the grid row by row."""
    square = (tiling.size, tiling.size)
    if tiling.mode != "anyres":
        return _values([(_padded(image) if tiling.mode == "pad" else image).resize(square, Image.Resampling.BICUBIC)])
    base = (_padded(image) if tiling.pads_base else image).resize(square, Image.Resampling.BICUBIC)
    grid = best_grid(image.size, tiling.grids)
    placed = _fitted(image, grid)
    boxes = [
        (left, top, left + tiling.size, top + tiling.size)
        for top in range(0, grid[1], tiling.size)
        for left in range(0, grid[0], tiling.size)
    ]
    return _values([base, *map(placed.crop, boxes)])


def _fitted(image: Image.Image, grid: Size) -> Image.Image:
    """The image as large as it fits into a grid, centred on black."""
    across, down = grid[0] / image.width, grid[1] / image.height
    if across < down:
        size = grid[0], min(math.ceil(image.height * across), grid[1])
    else:
        size = min(math.ceil(image.width * down), grid[0]), grid[1]
    below = Image.new("RGB", grid)
    below.paste(image.resize(size, Image.Resampling.BICUBIC), ((grid[0] - size[0]) // 2, (grid[1] - size[1]) // 2))
    return below


def _padded(image: Image.Image) -> Image.Image:
    """The image centred on a grey square."""
    side = max(image.size)
    below = Image.new("RGB", (side, side), PADDING)
    below.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return below


def _values(tiles: Sequence[Image.Image]) -> torch.Tensor:
    values = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2)
    return (values.float() / 255 - 0.5) / 0.5
