"""Images cut into tiles."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vision import noise_image

from imgdit.images.convert import to_rgb
from imgdit.images.tiles import Tiling, cut_tiles, read_image

GRIDS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
ODD = [
    (2, 2, "RGB"), (383, 385, "RGB"), (385, 383, "L"), (1, 9, "RGBA"), (9, 1, "P"), (77, 1000, "CMYK"),
    (1000, 77, "1"), (384, 384, "LA"), (769, 767, "RGB"), (641, 427, "RGBA"),
]  # fmt: skip
"""Width, height and mode."""


def by_the_rule(image: Image.Image, mode: str) -> np.ndarray:
    """The published rule written down once more, with whole images in place of tiles."""
    width, height = image.size
    if mode == "pad":
        square = Image.new("RGB", (max(image.size),) * 2, (127, 127, 127))
        square.paste(image, ((max(image.size) - width) // 2, (max(image.size) - height) // 2))
        image = square
    found = [np.asarray(image.resize((384, 384), Image.BICUBIC))]
    if mode == "anyres":
        kept = {}
        for across, down in GRIDS:
            scale = min(across / width, down / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            kept.setdefault((pixels, pixels - across * down), (across, down))
        across, down = kept[max(kept)]
        scale = across / width if across / width < down / height else down / height
        wide = across if across / width < down / height else min(math.ceil(width * scale), across)
        high = min(math.ceil(height * scale), down) if across / width < down / height else down
        black = np.zeros((down, across, 3), np.uint8)
        top, left = (down - high) // 2, (across - wide) // 2
        black[top : top + high, left : left + wide] = np.asarray(image.resize((wide, high), Image.BICUBIC))
        rows = [black[y : y + 384, x : x + 384] for y in range(0, down, 384) for x in range(0, across, 384)]
        found += rows
    return ((np.stack(found).transpose(0, 3, 1, 2).astype(np.float32) / 255) - 0.5) / 0.5


@pytest.mark.parametrize(("width", "height", "mode"), ODD)
@pytest.mark.parametrize("tiling", ["square", "pad", "anyres"])
def test_images_of_odd_sizes_and_modes_bit_for_bit(width, height, mode, tiling):
    image = noise_image(width, height, mode=mode)
    rgb = to_rgb(image)
    tiles = cut_tiles(rgb, Tiling(tiling, GRIDS))
    assert tiles.dtype == torch.float32 and tiles.shape[1:] == (3, 384, 384)
    assert torch.equal(tiles, torch.from_numpy(by_the_rule(rgb, tiling)))


def test_every_way_to_give_an_image_is_the_same(tmp_path):
    image = noise_image(31, 17)
    image.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.asarray(image).copy())
    given = [image, str(tmp_path / "a.png"), tmp_path / "a.png", np.asarray(image), pixels.permute(2, 0, 1)]
    given += [given[-1][None], given[-1].float() / 255]
    assert all(read_image(one).tobytes() == image.tobytes() for one in given)


def test_what_is_no_single_image_is_refused(tmp_path):
    noise_image(1, 1).save(tmp_path / "dot.png")
    with pytest.raises(ValueError, match=r"dot.png' has 1x1 pixels"):
        read_image(tmp_path / "dot.png")
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(ValueError, match=r"no.png' cannot be read"):
        read_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="got 2 images in one tensor"):
        read_image(torch.zeros(2, 3, 8, 8))


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of the tower's 384 pixels, got 384x400"):
        Tiling("anyres", ((384, 400),))
    with pytest.raises(ValueError, match="is 100 tiles, at most 64"):
        Tiling("anyres", ((3840, 3840),))
    with pytest.raises(ValueError, match="got none"):
        Tiling("anyres")
    with pytest.raises(ValueError, match="must be one of"):
        Tiling("whole")
