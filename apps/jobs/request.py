"""What a person asks for, as plain data. It travels inside the PNG that answers it, to make the picture again."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from imgdit.defaults import STEPS
from imgdit.images import fit, open_image, to_rgb
from imgdit.images.fitting import filter_of
from imgdit.io.safe_json import parse_object
from imgdit.naming import check_name

CHUNK = "imgdit"
"""Text chunk of a PNG that holds the request."""


@dataclass(frozen=True)
class Control:
    """A picture that steers another one."""

    kind: str
    """Name of an adapter, or of a task of `imgdit.tasks.TASKS`."""
    picture: Image.Image
    strength: float = 1.0
    """As `Condition.strength`; only an adapter has one."""
    start: float = 0.0
    end: float = 1.0
    """Share of the steps between which it acts."""


@dataclass(frozen=True)
class AskedFrame:
    """A frame that is given (a picture, or a camera) or made (neither)."""

    kind: str = "image"
    picture: Image.Image | None = None
    camera: tuple[float, float] | None = None
    """Azimuth and elevation in degrees, of a frame of kind "rays"."""


@dataclass(frozen=True)
class Request:
    """Everything that decides a picture, but for the model."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = STEPS
    guidance: float | None = None
    """`None`: 3 where a picture is made, 1 where only maps of a given one are."""
    height: int | None = None
    width: int | None = None
    """Pixels; `None`: what the model was trained at."""
    controls: tuple[Control, ...] = ()
    frames: tuple[AskedFrame, ...] = ()
    """Of any-to-any, in the order of `imgdit.tasks.task_frames`; empty: one picture is made."""
    task: str | None = None
    """Of the frames, where their kinds do not tell."""
    concepts: tuple[str, ...] = ()
    """Are unlearned."""
    mode: str = "scale"
    multiplier: float | None = None
    """How, see `ConceptUnlearner.attach`."""
    features: tuple[tuple[int, float], ...] = ()
    """Numbers of features of the sparse autoencoder, and what each is multiplied by."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.controls and self.frames:
            raise ValueError("a request has controls or frames; give a control as a frame that is given")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Kinds of the pictures that are made, in their order."""
        made = tuple(f.kind for f in self.frames if f.picture is None and f.kind != "rays")
        return made if self.frames else ("image",)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only, without what has its default; pictures become PNGs in base64."""
        return {
            field.name: _plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """What `to_dict` wrote.

        Raises:
            ValueError: an unknown name, a value of another type, or a damaged picture.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            check_name("entry of a request", name, known)
        try:
            read = dict(values)
            read["controls"] = tuple(Control(**_pictured(item)) for item in values.get("controls", ()))
            read["frames"] = tuple(
                AskedFrame(**_pictured(item) | {"camera": _pair(item.get("camera"))})
                for item in values.get("frames", ())
            )
            read["concepts"] = tuple(map(str, values.get("concepts", ())))
            read["features"] = tuple((int(number), float(by)) for number, by in values.get("features", ()))
            return cls(**read)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"a request is not of the expected form: {error}") from error

    def digest(self, model: str) -> str:
        """A short hash of this and the model's name: tells whether a file answers this request."""
        text = json.dumps([model, self.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Origin:
    """What a PNG tells of its making."""

    request: Request
    places: dict[str, str | None]
    """Folder or Hub repository of the `model`; folders of `adapters` and of the `sae` that are not the model's own."""
    asked: str
    """`Request.digest` of what was asked, before defaults were filled in."""
    output: int
    """Number of the picture among those that the request makes."""
    made_with: dict[str, Any]
    """Versions, device and weights; another value of any of them may change the last bits."""


def write_png(picture: Image.Image, path: Path, origin: Origin) -> None:
    """Save a picture with its origin; the file appears whole or not at all."""
    values = {
        **dataclasses.asdict(dataclasses.replace(origin, request=Request())),
        "request": origin.request.to_dict(),
    }
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, json.dumps(values))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    picture.save(temporary, "PNG", pnginfo=info)
    temporary.replace(path)


def read_origin(path: Path) -> Origin | None:
    """What `write_png` wrote into a picture; `None` where there is nothing.

    Raises:
        ValueError: no picture, or a damaged origin.
    """
    picture = open_image(path)
    text = picture.info.get(CHUNK)
    if text is None:
        return None
    try:
        values = parse_object(text, "it")
        return Origin(**{**values, "request": Request.from_dict(values["request"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds a request that cannot be read: {error}") from error


def fitted(picture: Image.Image, kind: str, height: int | None, width: int | None) -> Image.Image:
    """A picture in RGB, cut and shrunk to the size of what is made; one that is smaller stays as it is."""
    picture = to_rgb(picture)
    if height is None or width is None or (picture.width <= width and picture.height <= height):
        return picture
    return fit(picture, (width, height), filter_of(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _pictured(values: Mapping[str, Any]) -> dict[str, Any]:
    text = values.get("picture")
    if text is None:
        return dict(values)
    try:
        data = base64.b64decode(text)
    except ValueError as error:
        raise ValueError(f"an image of the request is damaged: {error}") from error
    picture = open_image(data, "an image of the request")
    return {**values, "picture": picture}


def _pair(values: Any) -> tuple[float, float] | None:
    if values is None:
        return None
    azimuth, elevation = values
    return float(azimuth), float(elevation)
