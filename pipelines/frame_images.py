"""Images into frames and out of them: sizes, crops, depth and segmentation.

P images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from imgdit.images.convert import to_pixels
from imgdit.images.preprocess import areas_of_colours
from imgdit.tasks import hex_colour

# Height and width of OneDiffusion's images of about 512 x 512 pixels, from wide to tall.
BUCKETS = (
    *((256, w) for w in (1024, 992, 960, 928)),
    *((288, w) for w in (896, 864, 832)),
    *((320, w) for w in (800, 768)),
    *((352, w) for w in (736, 704, 672)),
    *((384, 672), (384, 640), (416, 608), (416, 576), (448, 576), (448, 544), (480, 544), (480, 512), (512, 512)),
    *((512, 480), (544, 480), (544, 448), (576, 448), (576, 416), (608, 416), (640, 384), (672, 384)),
    *((h, 352) for h in (704, 736)),
    *((h, 320) for h in (768, 800)),
    *((h, 288) for h in (832, 864, 896)),
    *((h, 256) for h in (928, 960, 992, 1024)),
)


def bucket_size(height: int, width: int) -> tuple[int, int]:
    """Height and width, of about 512 x 512 pixels, whose ratio is nearest to an image's."""
    return min(BUCKETS, key=lambda size: abs(round(size[0] / size[1], 2) - height / width))


def pixels_of_images(
    images: Sequence[Any], height: int, width: int, *, crop: bool = True, stretch_bright: bool = False
) -> torch.Tensor:
    """Images of any sizes to (P, 3, height, width) in [-1, 1].

    Args:
        images: what `imgdit.images.to_pixels` takes.
        height, width: in pixels.
        crop: cut the largest middle part of the right ratio and resize it without antialias, as OneDiffusion does;
            otherwise resize all of it, with antialias.
        stretch_bright: where no value of all the images is below the middle, map the upper half of the range to the
            whole. OneDiffusion does so, by mistake.
    """
    read = [to_pixels(image) for image in images]
    if any(len(one) != 1 for one in read):
        raise ValueError("an entry of a frame is one image; give several as a list, one per prompt")
    pixels = torch.cat([_resized(one, height, width, crop) for one in read]) * 2 - 1
    return pixels * 2 - 1 if stretch_bright and bool((pixels >= 0).all()) else pixels


def _resized(image: torch.Tensor, height: int, width: int, crop: bool) -> torch.Tensor:
    if crop:
        rows, columns = image.shape[-2:]
        high, wide = min(rows, columns * height / width), min(columns, rows * width / height)
        top, left = int((rows - high) / 2), int((columns - wide) / 2)
        image = image[..., top : top + int(high), left : left + int(wide)]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=not crop)


def depth_of_images(images: torch.Tensor) -> np.ndarray:
    """Nearness (P, H, W) float32 in [0, 1], 1 the nearest: the luminance of images (P, 3, H, W) in [0, 1]."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("pchw,c->phw", images, weights).cpu().numpy()


def labels_of_images(images: torch.Tensor, legend: Mapping[str, str]) -> np.ndarray:
    """Number of the object (P, H, W) int64 whose colour an area has: 0 black, which is nothing, 1 the legend's first.

    Args:
        images: (P, 3, H, W) in [0, 1].
        legend: colour, by name or "#RRGGBB", of each object.
    """
    codes = ["#000000", *(hex_colour(colour) for colour in legend.values())]
    colours = images.new_tensor([[int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for code in codes])
    return areas_of_colours(images, colours).cpu().numpy()
