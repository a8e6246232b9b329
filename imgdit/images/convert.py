"""Images of every mode and number type to RGB, and back.

What the values mean, everywhere (conditions, frames, training, the command line, the demo):

- 8 bits (every such PIL mode; uint8): 0 is black, 255 white.
- 1 bit (PIL "1"; bool): false is black, true white.
- 16 bits (PIL "I;16…", PNG files in mode "I"; uint16): 0 is black, 65535 white.
- Whole numbers of no known depth (PIL "I"; int32, int64, …): 0 and 1 where nothing is above 1; 0 to 65535 where
  something is above 255; in between nobody can tell, and they are refused.
- Floating point (PIL "F"; float16 to float64): 0.0 is black, 1.0 white. Anything beyond is refused: divide 0..255 by
  255, scale metres by near and far.

Nothing beyond rounding is cut off, and values that are not finite are refused. What is transparent is put on a colour,
white by default. CMYK goes through the image's own profile where it has a sound one. PIL images become 8 bits per
channel, as in training; arrays and tensors keep their precision.

B images, H x W pixels, C channels.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor

from imgdit.images.opening import is_turned, name_of, readable, upright

ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
"""PIL's modes with a channel of opacity."""
ROUNDING = 0.5 / 255
"""How far beyond [0, 1] a floating-point value is taken for rounding."""


def to_rgb(image: Image.Image, background: str = "white", name: str | None = None) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, upright, its transparency put on a colour.

    Args:
        image: of any mode; read whole if it was not yet.
        background: a colour by name or "#RRGGBB".
        name: what messages call it; by default its file.

    Raises:
        ValueError: damaged, or values that have no known black and white (see the module's table).
    """
    image = to_rgba(image, name)
    if image.mode == "RGB":
        return image
    below = Image.new("RGBA", image.size, ImageColor.getrgb(background))
    return Image.alpha_composite(below, image).convert("RGB")


def to_rgba(image: Image.Image, name: str | None = None) -> Image.Image:
    """As `to_rgb`, but with its opacity as a fourth channel where it has one: mode "RGBA" or "RGB"."""
    name = name or name_of(image)
    with readable(name):
        image.load()
        if is_turned(image):
            image = upright(image)
        opacity = None
        if image.mode.startswith(("I", "F")):
            image, opacity = _narrow(image, name)
        if has_alpha(image):
            return _with_alpha(image)
        image = _from_cmyk(image) if image.mode == "CMYK" else image.convert("RGB")
        if opacity is not None:
            image.putalpha(opacity)
        return image


def has_alpha(image: Image.Image) -> bool:
    """Whether anything of it may be transparent."""
    return image.mode in ALPHA_MODES or "transparency" in image.info


def notes_of(image: Image.Image) -> tuple[str, ...]:
    """What has to be done to an image as it lies in its file: "rotated", "alpha", "16 bit", "cmyk", "animated"."""
    found = {
        "animated": getattr(image, "is_animated", False),
        "rotated": is_turned(image),
        "16 bit": image.mode.startswith("I"),
        "alpha": has_alpha(image),
        "cmyk": image.mode == "CMYK",
    }
    return tuple(note for note, is_so in found.items() if is_so)


def to_pixels(image: Any, background: str = "white") -> torch.Tensor:
    """Anything that holds an image as (B, 3, H, W) float32 in [0, 1].

    Args:
        image: PIL image of any mode; array (H, W), (H, W, C) or (B, H, W, C); tensor (H, W), (C, H, W) or
            (B, C, H, W); C = 1 grey, 2 grey and opacity, 3 RGB, 4 RGB and opacity. Number types: see the module.
        background: what is transparent becomes it; a colour by name or "#RRGGBB".

    Raises:
        ValueError: another type or shape, values that have no known black and white or are not finite, or a damaged
            file.
    """
    if isinstance(image, Image.Image):
        return _tensor(np.array(to_rgb(image, background)))[None]
    values = channels_first(image, "an image")
    unit = to_unit(values)
    if unit.shape[1] in (2, 4):
        colour, opacity = unit[:, :-1], unit[:, -1:]
        below = unit.new_tensor(ImageColor.getrgb(background)[:3]).view(1, 3, 1, 1) / 255
        unit = colour * opacity + below * (1 - opacity)
        if values.dtype == torch.uint8:  # as a PIL image of 8 bits
            unit = (unit * 255).round() / 255
    return unit.expand(-1, 3, -1, -1)


def image_size(image: Any) -> tuple[int, int]:
    """Height and width in pixels of anything that `to_pixels` takes, as it is shown."""
    if isinstance(image, Image.Image):
        with readable(name_of(image)):
            return image.size if is_turned(image) else image.size[::-1]
    rows, columns = channels_first(image, "an image").shape[-2:]
    return rows, columns


def channels_first(image: Any, what: str) -> torch.Tensor:
    """An array (H, W), (H, W, C) or (B, H, W, C), or a tensor (H, W), (C, H, W) or (B, C, H, W), as (B, C, H, W).

    Args:
        image: of 1 to 4 channels; its number type stays.
        what: what the message calls it.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif" or image.dtype.itemsize > 8:
            raise ValueError(f"{what} is of numbers, got an array of {image.dtype}")
        values = torch.from_numpy(np.array(image, image.dtype.newbyteorder("="), order="C"))
        values = values[..., None] if values.ndim == 2 else values
        values = values.movedim(-1, -3) if values.ndim > 2 else values
    elif isinstance(image, torch.Tensor):
        values = image[None] if image.ndim == 2 else image
    else:
        raise ValueError(f"{what} is a PIL image, an array or a tensor, got {type(image).__name__}")
    values = values[None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[1] not in (1, 2, 3, 4) or 0 in values.shape:
        raise ValueError(
            f"got {what} of shape {tuple(image.shape)}; expected (H, W) or (H, W, 3) for an array, (H, W) or "
            "(3, H, W) for a tensor; 1 channel is grey, 2 and 4 are grey and RGB with opacity"
        )
    return values


def to_unit(values: torch.Tensor, what: str = "an image") -> torch.Tensor:
    """Numbers of any type to float32 in [0, 1], by the table of this module.

    Args:
        values: of any shape.
        what: what the message calls it.
    """
    if values.dtype == torch.bool:
        return values.float()
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.uint16:
        return values.to(torch.int32).float() / 65535
    if values.dtype.is_complex:
        raise ValueError(f"{what} is of real numbers, got {values.dtype}")
    if values.dtype.is_floating_point:
        unit = values.float()
        if not unit.isfinite().all():
            raise ValueError(f"{what} has values that are not finite (NaN or infinity)")
        low, high = float(unit.min()), float(unit.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(
                f"{what} of floating-point numbers has values in [0, 1], got {low:.4g} to {high:.4g}; divide 0..255 "
                "by 255, and scale metres of depth to 1 (near) .. 0 (far)"
            )
        return unit.clamp(0, 1) if low < 0 or high > 1 else unit
    whole = values.to(torch.int64)
    return whole.float() / _largest(int(whole.min()), int(whole.max()), what)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """A PIL image of (3, H, W) in [0, 1]; what lies beyond is cut off."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _tensor(array: np.ndarray) -> torch.Tensor:
    """(3, H, W) in [0, 1] of bytes (H, W, 3)."""
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _largest(low: int, high: int, what: str) -> int:
    """What is white in whole numbers of no known depth."""
    if low < 0 or high > 65535:
        raise ValueError(f"{what} has values from {low} to {high}, not 16 bits (0 to 65535); scale them")
    if 1 < high <= 255:
        raise ValueError(
            f"{what} has whole numbers from {low} to {high} that may be 8 or 16 bits; say which: convert them to "
            "uint8 (PIL: mode 'L') or to uint16 (PIL: mode 'I;16')"
        )
    return 65535 if high > 1 else 1


def _narrow(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Whole or floating-point numbers of mode I… or F to 8 bits (Pillow's own conversion cuts off what is above 255),
    and the opacity if one of the values is called transparent."""
    values = np.asarray(image)
    if image.mode == "F":
        narrow = (to_unit(torch.from_numpy(values.copy()), name).numpy() * 255).round()
    else:
        # Pillow has opened PNG files of 16 bits in mode "I", depending on its version.
        deep = image.mode != "I" or (image.format in ("PNG", "PPM") and values.max() <= 65535)
        white = 65535 if deep else _largest(int(values.min()), int(values.max()), name)
        narrow = (values.astype(np.int64) * 255 + white // 2) // white
    clear = image.info.get("transparency")
    opacity = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    return Image.fromarray(narrow.astype(np.uint8)), opacity


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow has no way from there to RGBA at once
        image = image.convert("LA")
    clear = image.info.get("transparency")
    if (
        isinstance(clear, tuple) and max(clear) > 255
    ):  # of a PNG of 16 bits per channel, of which Pillow reads the upper
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA")


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Through the image's own profile, if it has a sound one."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except ImageCms.PyCMSError:
            pass  # a damaged profile costs the colours' exact shade, not the image
    return image.convert("RGB")
