"""What a person asks for, as plain data. It travels inside the PNG that answers it, to generate the image again."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from imgdit.defaults import STEPS, STRENGTH
from imgdit.images import fit, open_image, to_rgb
from imgdit.images.fitting import filter_of
from imgdit.naming import check_name, old_names
from imgdit.tasks import TASKS

STORED = {"image": "picture"}
"""Fields that have another name where a request is stored: the files of all versions are alike."""


@old_names(picture="image")
@dataclass(frozen=True)
class Control:
    """An image that steers the one that is generated."""

    kind: str
    """Name of an adapter, or of a task of `imgdit.tasks.TASKS`."""
    image: Image.Image
    strength: float = 1.0
    """As `Condition.strength`; only an adapter has one."""
    start: float = 0.0
    end: float = 1.0
    """Fraction of the steps between which it acts."""


@dataclass(frozen=True)
class RequestFrame:
    """An `imgdit.ImageFrame` as a request stores it: given (an image, or a camera) or generated (neither)."""

    kind: str = "image"
    image: Image.Image | None = None
    camera: tuple[float, float] | None = None
    """Azimuth and elevation in degrees, of a frame of kind "rays"."""


@dataclass(frozen=True)
class Request:
    """Everything that decides an image, but for the model."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = STEPS
    guidance: float | None = None
    """`None`: 3 where an image is generated, 1 where only maps of a given one are, and with `turbo`."""
    height: int | None = None
    width: int | None = None
    """Pixels; `None`: what the model was trained at."""
    controls: tuple[Control, ...] = ()
    frames: tuple[RequestFrame, ...] = ()
    """Of any-to-any, in the order of `imgdit.tasks.task_frames`; empty: one image is generated."""
    task: str | None = None
    """Of the frames, where their kinds do not tell."""
    concepts: tuple[str, ...] = ()
    """Are unlearned."""
    mode: str | None = "scale"
    """How, see `ConceptUnlearner.attach`; `None`: its default for the concepts, which is written in its place."""
    multiplier: float | None = None
    """See `ConceptUnlearner.attach`."""
    features: tuple[tuple[int, float], ...] = ()
    """Numbers of features of the sparse autoencoder, and what each is multiplied by."""
    turbo: bool = False
    """Use the few-step LoRA of the model's folder, with its number of steps and a guidance of 1."""
    image: Image.Image | None = None
    """What the run begins at, under noise, instead of at noise alone."""
    strength: float = STRENGTH
    """Of `image`: fraction of the steps that run."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.controls and self.frames:
            raise ValueError("a request has controls or frames; give a control as a conditioning frame")
        if self.image is not None and self.frames:
            raise ValueError("a request has an image to begin at or frames; give the image as a conditioning frame")
        if not 0 < self.strength <= 1:
            raise ValueError(f"the strength must be above 0 and at most 1, got {self.strength}")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Kinds of the images that are generated, in their order."""
        generated = tuple(f.kind for f in self.frames if f.image is None and f.kind != "rays")
        return generated if self.frames else ("image",)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only, without what has its default; images become PNGs in base64."""
        return {
            STORED.get(field.name, field.name): _plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """What `to_dict` wrote.

        Raises:
            ValueError: an unknown name, a value of another type, or a damaged image.
        """
        known = {STORED.get(field.name, field.name): field for field in dataclasses.fields(cls)}
        for name in values:
            check_name("entry of a request", name, known)
        try:
            read = _read(values)
            read["controls"] = tuple(Control(**_read(item)) for item in values.get("controls", ()))
            read["frames"] = tuple(
                RequestFrame(**_read(item) | {"camera": _pair(item.get("camera"))})
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


def frame_row(
    conditions: Sequence[tuple[str, Image.Image]],
    make: Sequence[str],
    cameras: Sequence[tuple[float, float]] = (),
) -> tuple[RequestFrame, ...]:
    """The frames in the order that tasks have them: the image first; of views, each with its camera.

    Args:
        given: kind and image; the other one of a pair of images is called by its task (blur, mask, …).
        make: kinds; nothing: the image, unless it is given.
        cameras: azimuth and elevation in degrees of each view; the first given images are of the first of them.

    Raises:
        ValueError: views of anything but images, or two images of which nobody can tell the task.
    """
    if cameras:
        if any(kind != "image" for kind, _ in conditions) or any(kind != "image" for kind in make):
            raise ValueError("views are of images; give image=FILE and cameras, and nothing to generate")
        if len(conditions) > len(cameras):
            raise ValueError(f"got {len(conditions)} images for {len(cameras)} cameras; give a camera for each view")
        images = [image for _, image in conditions] + [None] * (len(cameras) - len(conditions))
        return tuple(
            frame
            for image, camera in zip(images, cameras)
            for frame in (RequestFrame("image", image), RequestFrame("rays", camera=camera))
        )
    frames = [RequestFrame(kind, image) for kind, image in conditions]
    kinds = list(make) or ([] if any(kind == "image" for kind, _ in conditions) else ["image"])
    frames += [RequestFrame(kind) for kind in kinds]
    if len(frames) == 2 and all(frame.kind == "image" for frame in frames):
        pairs = ", ".join(name for name, task in TASKS.items() if task.condition == "image" and task.frames == (2, 2))
        raise ValueError(f"call one of two images by what it is to the other: {pairs}")
    # The image comes first, whatever the order of the arguments.
    return tuple(sorted(frames, key=lambda frame: frame.kind != "image"))


def fitted(image: Image.Image, kind: str, height: int | None, width: int | None) -> Image.Image:
    """An image in RGB, cut and shrunk to the size of what is generated; one that is smaller stays as it is."""
    image = to_rgb(image)
    if height is None or width is None or (image.width <= width and image.height <= height):
        return image
    return fit(image, (width, height), filter_of(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {STORED.get(name, name): _plain(getattr(value, name)) for name in names}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a control or a frame, from what `_plain` made of them."""
    stored = STORED["image"]
    if "image" in values:
        raise TypeError(f"an image is stored as {stored!r}, got 'image'")
    read = {name: value for name, value in values.items() if name != stored}
    text = values.get(stored)
    if text is None:
        return read
    try:
        data = base64.b64decode(text)
    except ValueError as error:
        raise ValueError(f"an image of the request is damaged: {error}") from error
    return {**read, "image": open_image(data, "an image of the request")}


def _pair(values: Any) -> tuple[float, float] | None:
    if values is None:
        return None
    azimuth, elevation = values
    return float(azimuth), float(elevation)
