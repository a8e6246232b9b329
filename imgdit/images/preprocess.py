"""Conditions computed from photos by the libraries that people use for it, and maps read back from images.

Images are (3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from imgdit.images.convert import to_image, to_pixels, to_rgb
from imgdit.images.masks import mask_values
from imgdit.images.opening import open_image
from imgdit.recipes import find_object

HOLE = 0.5
"""Grey of what an inpainting condition hides."""


def find_preprocessor(name: str) -> Callable[..., tuple[torch.Tensor, dict[str, Any]]]:
    """The function `(photo, **options) -> (condition (3, H, W) in [0, 1], details)` of a preprocessor.

    Args:
        name: a key of `PREPROCESSORS`, an entry point of the group "imgdit.preprocessors", or
            "package.module:function".

    Raises:
        ValueError: no such preprocessor, or something that cannot be called.
    """
    if name in PREPROCESSORS:
        return PREPROCESSORS[name]
    found = find_object(name, dict.fromkeys(PREPROCESSORS, ""), "imgdit.preprocessors", "unknown preprocessor")
    if not callable(found):
        raise ValueError(f"preprocessor must name a function (photo, **options), got {name!r}, which is {found!r}")
    return found


def check_preprocessor(name: str, options: Mapping[str, Any]) -> None:
    """Refuse at once what `preprocess` would refuse at its first photo.

    Raises:
        ImportError: a package is not installed.
        ValueError: no such preprocessor, or an option is missing.
    """
    find_preprocessor(name)
    if name == "canny":
        opencv()
    elif name == "depth":
        check_depth_model(options.get("model"))


def opened(photo: Image.Image | str | Path) -> Image.Image:
    return to_rgb(photo if isinstance(photo, Image.Image) else open_image(photo))


@lru_cache(maxsize=2)
def depth_model(name: str) -> Any:
    from transformers import pipeline

    return pipeline("depth-estimation", model=name)


def photo_depth(
    photo: Image.Image, model: str | None = None, near_is_large: bool = True
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Depth by a `depth-estimation` model of transformers: near is white, the nearest 1 and the farthest 0. The scale
    of a photo is unknown, so this is no image for `image_to_depth`.

    Args:
        photo: the image.
        model: folder or Hub repository of the model, such as "depth-anything/Depth-Anything-V2-Small-hf".
        near_is_large: whether the model says inverse depth, as DPT and Depth Anything do; `False` for models that say
            metres, such as ZoeDepth, GLPN and DepthPro.
    """
    check_depth_model(model)
    estimate = depth_model(model)(photo)["predicted_depth"].float()
    estimate = F.interpolate(estimate.view(1, 1, *estimate.shape[-2:]), photo.size[::-1], mode="bilinear")[0]
    low, high = estimate.amin(), estimate.amax()
    value = (estimate - low) / (high - low).clamp(min=1e-6)
    value = value if near_is_large else 1 - value
    return value.expand(3, -1, -1), {"estimate": estimate}


def check_depth_model(model: str | None) -> None:
    if not model:
        raise ValueError("depth of a photo needs a model; give model='depth-anything/Depth-Anything-V2-Small-hf'")


def photo_canny(photo: Image.Image, low: int = 100, high: int = 200) -> tuple[torch.Tensor, dict[str, Any]]:
    """Canny's edges, white on black.

    Args:
        photo: the image.
        low: gradient in [0, 255] from which an edge goes on.
        high: gradient from which one starts.
    """
    found = opencv().Canny(np.array(photo.convert("L")), low, high)
    return torch.from_numpy(found).float().div(255).expand(3, -1, -1), {"low": low, "high": high}


def opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("edges of photos need OpenCV; install it with: pip install 'imgdit[vision]'") from error
    return cv2


def areas_of_colours(image: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """Images (…, 3, H, W) to numbers (…, H, W) of the nearest colours of a palette (P, 3), where areas have them.

    An autoencoder blurs the border of two areas, and half-way between two colours of the palette may lie a third. So
    only a pixel whose neighbours are all of its colour is sure; the number spreads from there to those that are not.
    An image without a sure pixel is read pixel by pixel.
    """
    apart = (image.movedim(-3, -1)[..., None, :].float() - palette).square().sum(-1)  # (…, H, W, P)
    nearest = F.one_hot(apart.argmin(-1), len(palette)).movedim(-1, -3).float()
    layers = nearest.reshape(-1, *nearest.shape[-3:])  # (N, P, H, W)
    sure = -F.max_pool2d(-layers, 3, stride=1, padding=1)
    sure = torch.where(sure.flatten(1).any(1)[:, None, None, None], sure, layers)
    while not (known := sure.amax(1, keepdim=True) > 0).all():
        votes = F.avg_pool2d(sure, 3, stride=1, padding=1)
        sure = torch.where(known, sure, votes / votes.sum(1, keepdim=True).clamp_min(1e-6))
    return sure.reshape(nearest.shape).argmax(-3)


# Degraded images: the same for scenes and photos


def blurred(image: torch.Tensor, radius: float) -> torch.Tensor:
    return to_pixels(to_image(image).filter(ImageFilter.GaussianBlur(radius)))[0].to(image.device)


def photo_blur(photo: Image.Image, radius: float = 8.0) -> tuple[torch.Tensor, dict[str, Any]]:
    return blurred(to_pixels(photo)[0], radius), {"radius": radius}


def greyed(image: torch.Tensor) -> torch.Tensor:
    weights = image.new_tensor((0.299, 0.587, 0.114))[:, None, None]  # ITU-R BT.601, as Pillow's mode L
    return (image * weights).sum(0, keepdim=True).expand(3, -1, -1)


def photo_grey(photo: Image.Image) -> tuple[torch.Tensor, dict[str, Any]]:
    return to_pixels(photo.convert("L"))[0], {}


def with_hole(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.where(mask, HOLE, image), {"mask": mask}


def photo_mask(photo: Image.Image, mask: Image.Image | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hides what is white in `mask`, by default the middle of the image."""
    if mask is None:
        mask = Image.new("L", photo.size)
        width, height = photo.size
        mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    if mask.size != photo.size:
        raise ValueError(f"the mask has {mask.size} pixels (width, height), the photo {photo.size}; make them equal")
    return with_hole(to_pixels(photo)[0], mask_values(mask)[None])


def smaller(photo: Image.Image, factor: int) -> tuple[torch.Tensor, dict[str, Any]]:
    if factor < 2 or min(photo.size) < factor:
        raise ValueError(f"factor must be a whole number from 2 to {min(photo.size)}, got {factor}")
    size = (photo.width // factor, photo.height // factor)
    return to_pixels(photo.resize(size, Image.Resampling.BICUBIC))[0], {"factor": factor}


def photo_super_resolution(photo: Image.Image, factor: int = 4) -> tuple[torch.Tensor, dict[str, Any]]:
    return smaller(photo, factor)


PREPROCESSORS: dict[str, Callable[..., tuple[torch.Tensor, dict[str, Any]]]] = {
    "canny": photo_canny,
    "depth": photo_depth,
    "blur": photo_blur,
    "grey": photo_grey,
    "mask": photo_mask,
    "super_resolution": photo_super_resolution,
}
"""Functions `(photo, **options) -> (condition (3, H, W) in [0, 1], details)` by the condition that they compute."""


def preprocess(name: str, photo: Image.Image | str | Path, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """A condition computed from a photo, (3, H, W) in [0, 1], and what is known of it besides.

    Args:
        name: see `find_preprocessor`; the options are that function's.
        photo: an image or its file.
    """
    return find_preprocessor(name)(opened(photo), **options)
