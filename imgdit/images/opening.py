"""Files to PIL images: decoded whole, upright, never more than a limit of pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
"""Bytes 8 to 12 of HEIC and AVIF files (ISO 14496-12, box `ftyp`)."""


def open_image(source: Any, name: str | None = None, most: int | None = None) -> Image.Image:
    """An image file, decoded whole and turned as its camera was held (EXIF).

    Its mode, palette, text chunks and profile stay; `imgdit.images.to_rgb` makes RGB of it. Of an animation it is the
    first frame. HEIC files need the package pillow-heif, AVIF files Pillow 11.3 or that package.

    Args:
        source: a path, the bytes of a file, or an open binary file.
        name: what messages call it; by default the path, or the file's own name.
        most: pixels that are read; by default `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ValueError: no such file, no image, a damaged or truncated one, or more pixels.
    """
    name = name or name_of(source)
    with decode(source, name, most) as image, readable(name, most):
        return upright(image)


def decode(source: Any, name: str, most: int | None = None) -> Image.Image:
    """`open_image` without turning it: close what it returns."""
    with readable(name, most):
        if isinstance(source, (str, os.PathLike)) and not Path(source).exists():
            raise ValueError(f"there is no image {name}")
        if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
            raise ValueError(f"{name} is a folder; name an image file")
        stream = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        try:
            image: Image.Image = Image.open(stream)
        except UnidentifiedImageError:
            image = _open_heif(stream, name, most)
        _check_pixels(image.size, name, most)
        image.load()
        return image


def upright(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it, turned by its EXIF orientation; a copy."""
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which tells what whole numbers of mode "I" mean
    return turned


def is_turned(image: Image.Image) -> bool:
    """Whether its pixels lie otherwise than a viewer shows them."""
    return image.getexif().get(ORIENTATION, 1) not in (0, 1)


def name_of(source: Any) -> str:
    """What messages call an image: its path in quotes where there is one."""
    if isinstance(source, (str, os.PathLike)):
        return repr(str(source))
    named = getattr(source, "filename", None) or getattr(source, "name", None)
    return repr(str(named)) if isinstance(named, (str, os.PathLike)) and str(named) else "the image"


@contextmanager
def readable(name: str, most: int | None = None) -> Iterator[None]:
    """Whatever a damaged image does to Pillow inside becomes one ValueError that names it."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels, {_limit(most)}") from error
    except MemoryError as error:
        raise ValueError(f"{name} is too large for the memory of this machine; make it smaller") from error
    except Exception as error:  # Pillow's readers let out whatever damage does to them: IndexError, struct.error, …
        if isinstance(error, ValueError) and str(error).startswith((name, f"there is no image {name}")):
            raise
        raise ValueError(f"{name} cannot be read, it is damaged or no image: {error}") from error


def _check_pixels(size: tuple[int, int], name: str, most: int | None) -> None:
    """Refuse an image that would take too much memory, asked of its header before anything is unpacked."""
    limit = most or Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise ValueError(f"{name} has {size[0]}x{size[1]} pixels, {_limit(most)}")


def _limit(most: int | None) -> str:
    limit = most or Image.MAX_IMAGE_PIXELS or 0
    raised = "" if most else ", or raise PIL.Image.MAX_IMAGE_PIXELS"
    return f"at most {limit / 1e6:.0f} million pixels are read; make it smaller{raised}"


def heif_kind(data: bytes) -> str | None:
    """ "heic" or "avif" by the first bytes of a file, `None` for what is neither."""
    if data[4:8] != b"ftyp" or data[8:12] not in HEIF_BRANDS:
        return None
    return "avif" if data[8:12] in (b"avif", b"avis") else "heic"


def _open_heif(stream: Any, name: str, most: int | None) -> Image.Image:
    """HEIC or AVIF by pillow-heif, which stays unregistered; what is neither is no image."""
    if hasattr(stream, "read"):
        stream.seek(0)
        data = stream.read()
    else:
        data = Path(stream).read_bytes()
    kind = heif_kind(data)
    if kind is None:
        raise ValueError(f"{name} cannot be read, it is damaged or no image: its first bytes are of no known format")
    try:
        import pillow_heif
    except ImportError as error:
        avif = kind == "avif"
        needed = "Pillow 11.3 or newer, or pillow-heif" if avif else "pillow-heif"
        raise ValueError(
            f"{name} is {'an AVIF' if avif else 'a HEIC'} image, for which {needed} is needed; install it with: "
            "pip install pillow-heif; or save the image as PNG or JPEG"
        ) from error
    opened = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    _check_pixels(opened.size, name, most)
    return opened.to_pillow()
