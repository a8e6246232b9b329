"""PNG files that tell how they were made, so that `imgdit generate --like` can make them again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from imgdit.apps.jobs.request import Request
from imgdit.images import open_image
from imgdit.io.safe_json import parse_object

CHUNK = "imgdit"
"""Text chunk of a PNG that holds the request."""


@dataclass(frozen=True)
class Origin:
    """What a PNG tells of its making."""

    request: Request
    places: dict[str, str | None]
    """Folder or Hub repository of the `model`; folders of `adapters` and of the `sae` that are not the model's own."""
    asked: str
    """`Request.digest` of what was asked, before defaults were filled in."""
    output: int
    """Number of the image among those that the request makes."""
    made_with: dict[str, Any]
    """Versions, device and weights; another value of any of them may change the last bits."""


def write_png(image: Image.Image, path: Path, origin: Origin) -> None:
    """Save an image with its origin; the file appears whole or not at all."""
    values = {
        **dataclasses.asdict(dataclasses.replace(origin, request=Request())),
        "request": origin.request.to_dict(),
    }
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, json.dumps(values))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    image.save(temporary, "PNG", pnginfo=info)
    temporary.replace(path)


def read_origin(path: Path) -> Origin | None:
    """What `write_png` wrote into an image; `None` where there is nothing.

    Raises:
        ValueError: no image, or a damaged origin.
    """
    image = open_image(path)
    text = image.info.get(CHUNK)
    if text is None:
        return None
    try:
        values = parse_object(text, "it")
        return Origin(**{**values, "request": Request.from_dict(values["request"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds a request that cannot be read: {error}") from error
